import io

import pytest
from rich.console import Console

from maxlm import units
from maxlm.progress import Progress, summary_table, track


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class NotANumber(float):
    def __float__(self):
        raise TypeError("not a number")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False)


def terminal(width=120):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, _environ={"TERM": "xterm"})


def shown(console) -> str:
    return console.file.getvalue()


def train(progress, clock, steps, step_time_s=1.0):
    for step in steps:
        clock.now += step_time_s
        progress.update(step, loss=4.0, tokens_per_s=12_345.0, step_time_s=step_time_s)


def test_plain_lines_first_then_rarely_then_last(clock):
    console, log = plain_console(), io.StringIO()
    with Progress(100, console=console, log_file=log, clock=clock) as progress:
        train(progress, clock, range(1, 101))
    lines = shown(console).splitlines()
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert steps == [1, 2, 3, *range(13, 100, 10), 100]
    assert log.getvalue() == shown(console)
    assert lines[3] == "step  13/100   loss 4.0000   12.3k tokens/s   ETA 1 min 27 s   1.00 s/step"
    assert "ETA" not in lines[0], "the first step compiles and says nothing about the pace"
    assert "ETA" not in lines[-1]


def test_lines_are_not_broken_without_a_terminal(clock):
    console = plain_console()
    with Progress(10, console=console, clock=clock) as progress:
        progress.note("x" * 300)
        progress.update(1, loss=1.0, **{f"value_{i}": 1.0 for i in range(20)})
    lines = shown(console).splitlines()
    assert len(lines) == 2
    assert "value_19 1" in lines[1]


def test_a_resumed_run_shows_its_first_steps_and_its_own_pace(clock):
    console = plain_console()
    with Progress(1000, start_step=900, console=console, clock=clock) as progress:
        train(progress, clock, [901, 902], step_time_s=3.0)
    lines = shown(console).splitlines()
    assert lines[0].startswith("step  901/1000")
    assert "ETA 4 min 54 s" in lines[1]


def test_mfu_is_shown_only_when_the_peak_is_known(clock):
    for peak, known in ((1e12, True), (None, False)):
        console = plain_console()
        with Progress(10, peak_flops=peak, flops_per_token=4e7, console=console, clock=clock) as progress:
            progress.update(1, loss=1.0, tokens_per_s=10_000.0)
        assert ("MFU 40.0%" in shown(console)) is known


def test_dollars_are_shown_only_where_a_price_is_known(clock):
    for usd, words in ((0.0123, "$0.012 so far"), (4.5, "$4.50 so far"), (12345.6, "$12,346 so far"), (None, None)):
        console = plain_console()
        with Progress(10, console=console, clock=clock) as progress:
            progress.update(1, loss=1.0, step_time_s=2.0, usd=usd, grad_norm=1.0)
        assert (f"2.00 s/step   {words}   grad_norm" if words else "2.00 s/step   grad_norm") in shown(console)


def test_a_loss_that_is_not_finite_is_shown(clock):
    console = plain_console()
    with Progress(10, console=console, clock=clock) as progress:
        progress.update(1, loss=float("nan"), tokens_per_s=float("inf"))
    assert "loss nan   inf tokens/s" in shown(console)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_in_a_terminal_one_line_moves_and_fits(clock, width):
    console, log = terminal(width), io.StringIO()
    with Progress(50, console=console, log_file=log, clock=clock) as progress:
        train(progress, clock, range(1, 26))
        progress.note("[saved] checkpoint 25")
        train(progress, clock, range(26, 51))
    text = shown(console)
    assert "[saved] checkpoint 25" in text, "brackets are not markup"
    assert "step 50/50" in text
    assert ("tokens/s" in text) is (width > 60)
    assert max(len(line) for line in text.split("\x1b[2K")[-1].splitlines()) <= width + 20
    assert "[saved] checkpoint 25\n" in log.getvalue()
    assert "step 50/50   loss 4.0000" in log.getvalue()
    assert "\x1b" not in log.getvalue()


def test_the_terminal_is_given_back_after_an_error(clock):
    console = terminal()
    with pytest.raises(TypeError, match="not a number"), Progress(10, console=console, clock=clock) as progress:
        progress.update(1, loss=NotANumber())
    assert shown(console).rstrip("\n").endswith("\x1b[?25h"), "the cursor is shown again"


def test_summary_table_aligns_and_leaves_out_what_is_not_known():
    assert summary_table({"model": "12 layers", "MFU": None, "mesh": 8}) == "model   12 layers\nmesh    8"
    assert summary_table({}) == ""


def test_track_without_a_terminal(clock):
    console = plain_console()
    with track("copy", total=4 * 2**20, console=console, clock=clock) as advance:
        for _ in range(4):
            clock.now += 6.0
            advance(2**20)
    assert shown(console).splitlines() == [
        "copy: 2.00 MiB of 4.00 MiB, 171 KiB/s, 12.0 s left",
        "copy: 4.00 MiB of 4.00 MiB, 171 KiB/s",
        "copy: 4.00 MiB of 4.00 MiB, 171 KiB/s",
    ]


def test_track_counts_other_things_and_unknown_totals(clock):
    console = plain_console()
    with track("read", unit="documents", console=console, clock=clock) as advance:
        clock.now += 2.0
        advance(3000)
    assert shown(console) == "read: 3.00k documents, 1.50k documents/s\n"


def test_track_in_a_terminal():
    console = terminal()
    with track("read", total=10, unit="documents", console=console) as advance:
        advance(10)
    assert "10/10" in shown(console)


def test_units():
    assert [units.count(n) for n in (0, 999, 1000, 999_950, 8.03e9, 1.2e12, 0.5)] == [
        *("0", "999", "1.00k", "1.00M", "8.03B", "1.20T", "0.50")
    ]
    assert [units.size(n) for n in (0, 512, 1536, 80e9)] == ["0 B", "512 B", "1.50 KiB", "74.5 GiB"]
    assert [units.duration(s) for s in (0, 0.0351, 0.99999, 42, 59.97, 125, 3599.9, 12_000, 180_000)] == [
        *("0 s", "35.1 ms", "1.00 s", "42.0 s", "1 min 00 s", "2 min 05 s", "1 h 00 min", "3 h 20 min", "2 d 2 h")
    ]
