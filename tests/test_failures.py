"""Goodput under failures: against the formula of Daly, against arithmetic, and what slices that come and go change."""

import json
import math

import pytest

from maxlm import cli
from maxlm.config_file import ConfigError
from maxlm.plan.failures import (
    LOST,
    WAITING,
    WORK,
    Failures,
    Fleet,
    Recovery,
    best_interval_s,
    daly_goodput,
    daly_s,
    mtbi_s,
    simulate,
    young_s,
)

HOUR_S, DAY_S = 3600.0, 86400.0


@pytest.mark.parametrize(("blocking_s", "restart_s"), [(5, 0), (30, 300), (120, 600), (600, 60)])
def test_goodput_and_best_interval_are_dalys_where_his_assumptions_hold(blocking_s, restart_s):
    fleet, failures, recovery = Fleet(1, 1), Failures(slice_mtbf_s=HOUR_S), Recovery(blocking_s, reschedule_s=restart_s)
    formula_s = daly_s(blocking_s, HOUR_S)
    for interval_s in (formula_s / 2, formula_s, formula_s * 2):
        found = simulate(fleet, failures, recovery, 600 * HOUR_S, interval_s)
        expected = daly_goodput(interval_s, blocking_s, restart_s, HOUR_S)
        assert found.fraction == pytest.approx(expected, rel=0.01)
        assert found.fraction_low < expected < found.fraction_high
    best_s = best_interval_s(fleet, failures, recovery, 600 * HOUR_S)
    assert best_s == pytest.approx(formula_s, rel=0.05)
    assert daly_goodput(best_s, blocking_s, restart_s, HOUR_S) == pytest.approx(
        daly_goodput(formula_s, blocking_s, restart_s, HOUR_S), rel=1e-3
    )


def test_formulas_of_young_and_daly():
    assert young_s(50, 10_000) == 1000
    assert daly_s(1e-4, HOUR_S) == pytest.approx(young_s(1e-4, HOUR_S), rel=1e-3)  # to first order the same
    assert daly_s(3 * HOUR_S, HOUR_S) == HOUR_S
    best = max(range(100, 2000), key=lambda tau: daly_goodput(tau, 60, 0, HOUR_S))
    assert daly_s(60, HOUR_S) == pytest.approx(best, rel=0.001)


def test_without_failures_only_saves_cost():
    found = simulate(Fleet(4, 64), Failures(), Recovery(10, write_s=5), 1000, 100)
    assert found.wall_s == 1000 + 9 * 10  # the last one comes after the last step
    assert found.fraction == found.fraction_low == found.paid_fraction == pytest.approx(1000 / 1090)
    # a save waits for the one before it, so that a shorter interval gains nothing
    slow = simulate(Fleet(4, 64), Failures(), Recovery(10, write_s=150), 1000, 100)
    assert slow.wall_s == 1000 + 9 * 10 + 8 * 50


def test_shares_are_all_of_the_time():
    fleet = Fleet(8, 4, allowed=(8, 7))
    failures = Failures(chip_mtbf_s=50 * HOUR_S, preempted_every_s=20 * HOUR_S, away_s=HOUR_S)
    found = simulate(fleet, failures, Recovery(10, 60, 60, 60, 60, 60), 10 * DAY_S, 600)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert min(found.shares.values()) > 0.0005
    assert found.shares[WORK] == pytest.approx(found.fraction)
    assert found.fraction < found.paid_fraction < 1


def test_a_run_of_all_slices_waits_for_the_one_that_left():
    """One of 4 slices is away for 1 h of each 11 h: all of them are there (10/11)^4 of the time."""
    failures = Failures(preempted_every_s=10 * HOUR_S, away_s=HOUR_S)
    found = simulate(Fleet(4, 1), failures, Recovery(1e-6), 100 * DAY_S, 1)
    assert 1 - found.shares[WAITING] == pytest.approx((10 / 11) ** 4, rel=0.01)
    assert found.fraction == pytest.approx((10 / 11) ** 4, rel=0.01)


def test_an_elastic_run_goes_on_with_the_slices_that_are_there():
    """Any number allowed and nothing lost: its speed is the mean of those there, 10/11."""
    failures = Failures(preempted_every_s=10 * HOUR_S, away_s=HOUR_S, notice_s=1)
    found = simulate(Fleet(4, 1, allowed=(4, 3, 2, 1)), failures, Recovery(1e-6), 100 * DAY_S, 1)
    assert found.fraction == pytest.approx(10 / 11, rel=0.01)
    assert found.paid_fraction == pytest.approx(1, abs=1e-3)  # slices that are away cost nothing


def test_spare_slices_that_fail_or_leave_disturb_nobody():
    failures = Failures(preempted_every_s=HOUR_S, away_s=0.01 * HOUR_S)
    recovery = Recovery(1, reschedule_s=300)
    half = simulate(Fleet(2, 1, allowed=(1,)), failures, recovery, DAY_S, 60)
    alone = simulate(Fleet(1, 1), failures, recovery, DAY_S, 60)
    assert half.fraction == pytest.approx(alone.fraction / 2, rel=0.1)
    assert half.num_preemptions > 1.5 * alone.num_preemptions * half.wall_s / 2 / alone.wall_s


def test_notice_saves_what_would_be_lost():
    fleet, recovery = Fleet(4, 8), Recovery(5, 20, detect_s=30)
    silent, warned, late = (
        simulate(fleet, Failures(preempted_every_s=DAY_S, away_s=60, notice_s=n), recovery, 30 * DAY_S, HOUR_S)
        for n in (0, 30, 20)
    )
    assert warned.shares[LOST] < 0.02 * silent.shares[LOST]
    assert late == silent  # not enough for a save


def test_the_interval_is_counted_in_steps():
    """On half of the slices, a save comes after the same number of steps: as many saves for the same work."""
    whole = simulate(Fleet(2, 1), Failures(), Recovery(10), 1000, 100)
    half = simulate(Fleet(2, 1, allowed=(1,)), Failures(), Recovery(10), 1000, 100)
    assert (whole.wall_s, half.wall_s) == (1090, 2090)


def test_a_run_that_gets_nowhere_ends():
    found = simulate(Fleet(100, 100), Failures(chip_mtbf_s=HOUR_S), Recovery(10, reschedule_s=600), DAY_S, 60, 2)
    assert (found.fraction, found.wall_s) == (0, math.inf)


def test_a_run_too_long_to_simulate_is_continued_alike():
    """20,000 failures are simulated, of some 240,000."""
    found = simulate(Fleet(1, 1), Failures(slice_mtbf_s=600), Recovery(10, reschedule_s=30), 1500 * DAY_S, 100, 1)
    expected = daly_goodput(100, 10, 30, 600)
    assert found.fraction == pytest.approx(expected, rel=0.01)
    assert found.wall_s == pytest.approx(1500 * DAY_S / expected, rel=0.01)
    assert found.num_failures == pytest.approx(found.wall_s / 600, rel=0.02)


def test_the_same_seeds_give_the_same_runs():
    run = Fleet(4, 64), Failures(chip_mtbf_s=1000 * HOUR_S), Recovery(10), 30 * DAY_S, 600.0, 4
    assert simulate(*run, seed=1) == simulate(*run, seed=1) != simulate(*run, seed=2)


def test_interruptions_of_the_fleet():
    assert mtbi_s(Fleet(10, 100), Failures(chip_mtbf_s=1000 * HOUR_S)) == pytest.approx(HOUR_S)
    assert mtbi_s(Fleet(10, 100), Failures(1000 * HOUR_S, preempted_every_s=10 * HOUR_S)) == pytest.approx(HOUR_S / 2)
    assert mtbi_s(Fleet(10, 100), Failures()) == math.inf


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Fleet(0, 1), "num_slices=0"),
        (lambda: Fleet(10**9, 1), "num_slices=1000000000 .* 100,000"),
        (lambda: Fleet(4, 1, allowed=(8, 4)), "allowed=8"),
        (lambda: Failures(chip_mtbf_s=0), "chip_mtbf_s=0"),
        (lambda: Failures(away_s=math.nan), "away_s=nan"),
        (lambda: Recovery(0), "blocking_s=0"),
        (lambda: Recovery(1, write_s=math.inf), "write_s=inf"),
        (lambda: simulate(Fleet(1, 1), Failures(), Recovery(1), 0, 1), "work_s=0"),
    ],
)
def test_wrong_numbers_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# ---- maxlm goodput
COMMAND = ["goodput", "--slices", "8", "--chips-per-slice", "64", "--work", "10d", "--seeds", "4"]


def test_command_shows_the_best_interval_among_others(capsys):
    assert cli.main([*COMMAND, "--chip-mtbf", "1y", "--preempted-every", "4d", "--away", "1h", "--allowed", "8,6"]) == 0
    text = capsys.readouterr().out
    assert "512 chips in 8 slices, 10 d 0 h of work; a failure every 17 h 07 min and a preemption every 12 h" in text
    shares = [
        float(line.replace("*", "").split("%")[0].split()[-1])
        for line in text.splitlines()
        if " min " in line and "%-" in line
    ]
    assert len(shares) == 5 and max(shares) == shares[2] < 100
    assert "blocking 10s" in text and "Daly" in text


def test_command_prints_json_of_numbers(capsys):
    assert cli.main([*COMMAND, "--interval", "30min", "--chip-mtbf", "5y", "--json"]) == 0
    result = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (result["interval_s"], result["rows"][2]["interval_s"], result["rows"][0]["interval_s"]) == (1800, 1800, 450)
    assert result["failures"]["preempted_every_s"] is None
    assert result["mtbi_s"] == pytest.approx(5 * 365.25 * DAY_S / 512)
    assert 0.9 < result["rows"][2]["fraction"] < 1
    assert cli.main([*COMMAND, "--json"]) == 0  # nothing happens
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["daly_s"] is None


def test_command_says_so_when_a_run_gets_nowhere(capsys):
    assert cli.main([*COMMAND[:-1], "1", "--chip-mtbf", "10h", "--interval", "1min"]) == 0
    assert "gets nowhere: something happens every 1 min 10 s, and a restart takes 8 min" in capsys.readouterr().out
    few = ["goodput", "--slices", "100", "--chips-per-slice", "1", "--work", "1d", "--seeds", "1", "--interval", "1min"]
    assert cli.main([*few, "--preempted-every", "10h", "--away", "5h"]) == 0
    assert "gets nowhere: it waits for slices; --allowed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--chip-mtbf", "5"], "--chip-mtbf: '5' is no time with a unit"),
        (["--chip-mtbf", "0h"], "chip_mtbf_s=0"),
        (["--allowed", "9,8"], "allowed=9 is to be a number of slices from 1 to 8"),
        (["--allowed", "all"], "--allowed=all"),
        (["--seeds", "0"], "--seeds=0"),
        (["--blocking", "0s"], "blocking_s=0"),
    ],
)
def test_command_names_what_is_wrong(capsys, options, words):
    assert cli.main([*COMMAND, *options]) == 2
    assert words in capsys.readouterr().err
