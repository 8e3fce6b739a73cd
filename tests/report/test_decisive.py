"""The one rule for what a timing may decide: which timings it spoils, and what it compares rows by."""

from dataclasses import replace
from math import nan

import pytest
from support.records import timing

from clip_deploy.report.decisive import Pace, again, judged, pace, undecided

TIMING = timing(speedup=1.5, speedup_low=1.4, speedup_high=1.6, reference_p50_ms=3.0)
ALONE = replace(TIMING, p50_ms=3.0, speedup=1.0, speedup_low=0.99, speedup_high=1.01)


def spoiled(timing, reference=ALONE, on_gpu=False):
    """(whether the speed-up decides nothing, whether the whole timing does)."""
    rows = {"torch-fp32": {"vision": {1: reference}}, "a": {"vision": {1: timing}}}
    found = judged(rows, {"a"} if on_gpu else {})["a"]["vision"][1]
    return found.unstable, found.undecided


@pytest.mark.parametrize(
    ("change", "is_spoiled"),
    [
        ({}, False),
        ({"speedup_low": 1.0, "speedup_high": 1.5}, False),
        ({"speedup_low": 1.0, "speedup_high": 1.51}, True),
        ({"reference_p50_ms": 5.9, "p50_ms": 3.9}, False),
        ({"reference_p50_ms": 6.1, "p50_ms": 3.9}, True),
        ({"p50_ms": 1.55}, False),  # 3.0 / 1.55 is 1.94, within 1.6 by the factor
        ({"p50_ms": 1.45}, True),
        ({"p50_ms": 2.65}, False),
        ({"p50_ms": 2.75}, True),
        ({"reference_p50_ms": 1.49, "p50_ms": 1.0}, False),  # the reference's own row was disturbed then
        ({"speedup_high": nan}, True),
        ({"reference_p50_ms": nan}, True),
    ],
)
def test_on_a_cpu_a_wide_interval_or_a_reference_of_another_speed_spoils_the_whole_timing(change, is_spoiled):
    assert spoiled(replace(TIMING, **change)) == (is_spoiled, is_spoiled)


def test_a_machine_that_was_busy_all_the_while_is_known_by_the_row_beside_which_the_reference_ran_fastest():
    """As measured at a load of 10 on 2 cores: 74x and 492x, with narrow intervals, for what is 3x and 4x."""

    def timed(p50_ms, low, middle, high):
        return timing(reference_p50_ms=p50_ms, speedup=middle, speedup_low=low, speedup_high=high)

    rows = {
        "torch-fp32": {
            "vision": {1: timed(770.07, 1.0, 1.05, 1.08)},
            "text": {1: timed(376.73, 0.75, 0.99, 1.57)},
        },
        "ort-fp16": {"vision": {1: timed(257.79, 8.2, 11.9, 39.8)}, "text": {1: timed(46.99, 24.1, 62.5, 174.3)}},
        "ort-int8-static": {
            "vision": {1: timed(624.03, 67.76, 73.79, 76.83)},
            "text": {1: timed(293.79, 426.46, 492.39, 524.9)},
        },
    }
    assert list(undecided(judged(rows, {})["ort-int8-static"])) == ["vision, batch 1", "text, batch 1"]


def test_a_reference_that_differed_from_itself_widens_every_interval():
    assert spoiled(TIMING, replace(ALONE, speedup=1.25)) == (True, True)  # 1.6 * 1.25 over 1.4 / 1.25 is 1.79
    assert spoiled(TIMING, replace(ALONE, speedup=0.99)) == (False, False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"speedup_high": 9.0, "p90_ms": 3.0}, (True, False)),
        ({"p90_ms": 3.1}, (False, True)),
        ({"reference_p50_ms": 30.0}, (True, False)),
    ],
)
def test_on_a_gpu_the_speed_up_and_the_rows_own_calls_are_spoiled_apart(change, expected):
    assert spoiled(replace(TIMING, **change), on_gpu=True) == expected


def test_what_decides_nothing_is_named_by_tower_and_batch_size():
    wide = replace(TIMING, speedup_high=9.0)
    found = judged({"a": {"vision": {1: TIMING, 8: wide}, "text": {1: wide}}}, {})
    assert list(undecided(found["a"])) == ["vision, batch 8", "text, batch 1"]


def test_rows_are_compared_by_speed_up_on_a_cpu_and_by_p50_on_a_gpu():
    assert pace(replace(TIMING, speedup=2.0, speedup_low=1.0, speedup_high=4.0), False) == Pace(0.5, 0.25, 1.0)
    assert pace(TIMING, True) == Pace(2.0, 1.9, 2.1)


def test_one_command_times_all_spoiled_rows_again_beside_the_reference_that_they_are_held_against():
    assert again(["a", "torch-fp32", "b"]) == (
        "`dvc repro --force --single-item benchmark@torch-fp32 benchmark@a benchmark@b && dvc repro`"
    )
