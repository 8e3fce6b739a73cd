import shutil
from queue import Queue

import pytest

from benchmarks.side_by_side import phases, run, share_out

BEFORE = {
    "probe": set(),
    "package": {"recommend", "validate@a"},  # behind what is timed, through another
    "recommend": {"benchmark@a"},
    "report": {"validate@a", "benchmark@a", "benchmark@b"},
    "download": set(),
    "validate@a": {"download"},
    "validate@b": {"download"},
    "benchmark@a": {"download"},
    "benchmark@b": {"download"},
}


def test_what_is_timed_waits_for_all_that_is_not():
    probe, untimed, timed, behind = phases(BEFORE)
    assert probe == ["probe"]
    assert untimed == ["download", "validate@a", "validate@b"]
    assert timed == ["benchmark@a", "benchmark@b"]
    assert behind == ["recommend", "report", "package"]


def test_cores_are_shared_out_without_one_given_twice():
    queue: Queue = share_out([0, 1, 2, 3, 4], 2)
    assert [queue.get(), queue.get()] == [[0, 2, 4], [1, 3]]
    queue = share_out([7], 3)
    assert [queue.get() for _ in range(3)] == [[7], [7], [7]]


@pytest.mark.skipif(shutil.which("taskset") is None, reason="no taskset on this machine")
def test_a_stage_behind_one_that_failed_is_left_out(tmp_path, capfd):
    commands = {name: f"echo {name} >> {tmp_path}/order" for name in BEFORE} | {"validate@a": "echo broken; exit 3"}
    done = run(["validate@a", "validate@b", "report", "download"], BEFORE, commands, 2, set())
    assert done == {"download", "validate@b"}
    assert (tmp_path / "order").read_text().split() == ["download", "validate@b"]
    assert "validate@a: FAILED in" in capfd.readouterr().out


@pytest.mark.skipif(shutil.which("taskset") is None, reason="no taskset on this machine")
def test_what_is_done_already_is_not_run_again(tmp_path):
    commands = {name: f"echo {name} >> {tmp_path}/order" for name in BEFORE}
    kept = []
    done = run(["validate@a", "validate@b"], BEFORE, commands, 1, {"download", "validate@a"}, kept.append)
    assert done == {"download", "validate@a", "validate@b"}
    assert (tmp_path / "order").read_text().split() == ["validate@b"]
    assert kept == [done]
