"""What maxlm plan says of a model that does not fit: by how much, of what, and the smallest machine that would do."""

import errno
import json
import re

import pytest

from maxlm.cli import main
from maxlm.config_file import ConfigError, load_config
from maxlm.machines import name_of
from maxlm.plan import planner
from maxlm.plan.advice import smallest
from maxlm.plan.search import ROOM, search
from maxlm.plan.targets import target


def refusal(capsys, *arguments):
    assert main(["plan", "--compile", "0", *arguments]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def fits(config, name):
    place = target(name).place
    try:
        return place.fits(search(config, place)[0].memory)
    except ConfigError:
        return False


def test_bytes_that_are_over_and_what_uses_them(capsys):
    said = refusal(capsys, "configs/1b.yaml", "--on", "v5e-1")
    least = search(load_config("configs/1b.yaml", []), target("v5e-1").place)[0]
    needs, over, room = map(
        float, re.search(r"needs (\S+) GiB on a chip, (\S+) more than the (\S+) of 16", said).groups()
    )
    assert needs == pytest.approx(least.memory.peak / 2**30, abs=0.05)
    assert over == pytest.approx(needs - ROOM * 16, abs=0.15) and room == pytest.approx(ROOM * 16, abs=0.05)
    told = re.search(r"may fill \((.+?)\)", said)[1]
    parts = {part.rpartition(" ")[0]: float(part.rpartition(" ")[2]) for part in told.split(", ")}
    assert list(parts.values()) == sorted(parts.values(), reverse=True)
    assert sum(parts.values()) == pytest.approx(needs, abs=0.3) and {"weights", "optimizer"} <= parts.keys()


@pytest.mark.parametrize(
    ("name", "machine"), [("1b", "v5e-1"), ("llama3_8b", "v5e-8"), ("llama3_8b", "tpu7x-8"), ("llama3_8b", "h100:2")]
)
def test_no_smaller_machine_than_the_one_named_would_do(name, machine):
    config, where = load_config(f"configs/{name}.yaml", []), target(machine)
    found = smallest(config, where, ())
    assert fits(config, found.name)
    if where.machine.tpu is None:
        names = [f"h100:{n}" for n in (1, 2, 4, *range(8, 65, 8))]
    else:
        names = [name_of(where.machine.tpu, shape) for shape in where.machine.tpu.shapes]
    for other in names:
        assert target(other).num_chips >= found.num_chips or not fits(config, other), other


def test_the_smallest_machine_may_have_fewer_chips_than_the_one_asked_for(capsys):
    said = refusal(capsys, "configs/llama3_8b.yaml", "--on", "h100:56", "train.batch_size=64")
    assert "h100:56: no mesh of 56 devices divides this model and batch" in said
    named = re.search(r"(h100:\d+) is the smallest of its kind that would do", said)
    assert named and target(named[1]).num_chips < 56, said


def test_numbers_that_may_change_need_fewer_chips():
    config, where = load_config("configs/llama3_8b.yaml", []), target("v5e-1")
    kept, free = (smallest(config, where, names) for names in ((), ("state_dtype",)))
    assert free.num_chips < kept.num_chips


@pytest.mark.slow
def test_where_no_machine_of_the_kind_would_do(capsys):
    huge = ["model.num_layers=2000", "model.d_model=16384", "model.d_ff=65536"]
    said = refusal(capsys, "configs/llama3_70b.yaml", "--on", "v5e-256", *huge)
    assert "no slice of this kind would do with this batch" in said


def test_a_machine_that_is_too_small_does_not_keep_the_others_from_being_planned(capsys):
    assert main(["plan", "configs/1b.yaml", "--compile", "0", "--on", "v5e-1", "--on", "v5e-16", "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "1  v5litepod-16" in out and "v5litepod-1: the model does not fit" in out


# ---- deadlines and budgets


def days_and_dollars(said):
    found = re.search(r"([\d.e+]+) days", said), re.search(r"([\d,]+) USD, on", said)
    return [float(match[1].replace(",", "")) if match else None for match in found]


def test_the_nearest_possible_deadline_and_budget_are_possible(capsys):
    arguments = ["configs/1b.yaml", "--on", "v5e-16", "--on", "v5e-64"]
    days, _ = days_and_dollars(refusal(capsys, *arguments, "--deadline", "1h"))
    _, dollars = days_and_dollars(refusal(capsys, *arguments, "--budget", "10"))
    for option, possible, too_little in (
        ("--deadline", f"{days * 1.01:.4f}d", f"{days * 0.98:.4f}d"),
        ("--budget", str(dollars + 1), str(dollars - 1)),
    ):
        assert main(["plan", "--compile", "0", *arguments, option, possible]) == 0
        capsys.readouterr()
        refusal(capsys, *arguments, option, too_little)


def test_a_budget_that_only_slower_machines_keep_names_what_the_deadline_costs(capsys):
    arguments = ["configs/1b.yaml", "--on", "v5e-16", "--on", "v5p-64"]
    days, _ = days_and_dollars(refusal(capsys, *arguments, "--deadline", "1h"))
    _, dollars = days_and_dollars(refusal(capsys, *arguments, "--budget", "10"))
    both = ["--deadline", f"{days * 1.01:.4f}d", "--budget", str(dollars + 1)]
    said = refusal(capsys, *arguments, *both)
    assert "no plan that keeps the deadline keeps the budget; the cheapest costs" in said and "v5p-64" in said
    assert days_and_dollars(said)[1] > dollars


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--what-if", "--law", "none"], "--law=none is none of chinchilla"),
        (["--what-if", "--kept-tokens", "nan"], "--kept-tokens=nan is to be a share above 0 and at most 1"),
        (["--what-if", "--teacher", "configs/llama3_8b.yaml"], "--teacher and --distilled-tokens go together"),
        (["--what-if", "--teacher", "none.yaml", "--distilled-tokens", "0.1"], "config file none.yaml does not exist"),
        (["--scaling", "nowhere"], "run folder nowhere does not exist"),
    ],
)
def test_what_is_asked_beside_the_plan_is_checked_before_anything_is_compiled(arguments, sentence, capsys):
    assert main(["plan", "configs/1b.yaml", "--on", "v5e-16", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and sentence in err


def test_a_price_that_is_not_known_is_named_and_that_no_budget_holds_there(capsys):
    assert main(["plan", "--compile=0", "--top=1", "configs/1b.yaml", "--on=v5e-16", "--price-kind=spot"]) == 0
    assert "TPU v5e: no spot price is known: give yours with --prices\n" in capsys.readouterr().out
    arguments = ["--on=v5e-16", "--provider=Azure", "--budget=1"]
    assert main(["plan", "--compile=0", "--top=1", "configs/1b.yaml", *arguments]) == 0
    said = "no on-demand price of Azure is known: give yours with --prices; --budget leaves out none of its rows"
    assert said in capsys.readouterr().out


def test_a_config_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    arguments = ["configs/1b.yaml", "--on=v5e-16", "--write", str(tmp_path / "planned.yaml")]
    assert main(["plan", "--compile=0", "--top=1", *arguments]) != 0
    assert "No space left on device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_file_that_came_while_plans_were_made_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    path, ordered = tmp_path / "planned.yaml", planner.ordered
    monkeypatch.setattr(planner, "ordered", lambda rows: path.write_text("mine") and ordered(rows))
    assert main(["plan", "--compile=0", "--top=1", "configs/1b.yaml", "--on=v5e-16", "--write", str(path)]) == 2
    assert "it is there already" in capsys.readouterr().err and path.read_text() == "mine"


def test_names_of_one_machine_are_one(capsys):
    names = ["--on=v5e-16", "--on=v5litepod-16", "--on=V5E:4x4"]
    assert main(["plan", "--compile=0", "--top=1", "configs/1b.yaml", *names, "--json"]) == 0
    assert [plan["machine"] for plan in json.loads(capsys.readouterr().out)["plans"]] == ["v5litepod-16"]


def test_of_a_slice_of_chips_whose_links_are_unknown_no_network_between_slices_is_told(capsys):
    assert main(["plan", "--compile=0", "--top=1", "configs/1b.yaml", "--on=tpu7x-16"]) == 0
    assert "(between slices or nodes, in TPU7x all)" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["no/where.txt", "docs"])
def test_a_program_that_cannot_be_written_is_not_compiled(capsys, path):
    assert main(["compile", "configs/1b.yaml", "--on", "v5e-16", "--hlo", path]) == 2
    assert capsys.readouterr().err == f"error: --hlo {path}: it is to be a file, in a folder that is there\n"
