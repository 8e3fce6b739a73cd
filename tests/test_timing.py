import sys
from functools import partial

import numpy as np
import pytest

from clip_deploy.core.artifact import Target, build
from clip_deploy.core.config import BenchmarkConfig
from clip_deploy.core.errors import ConfigError, UnavailableError
from clip_deploy.timing import (
    LEAST_ROUNDS,
    Point,
    Worker,
    _take_turns,
    measure,
    percentiles,
    speedup_interval,
    summarize,
)


@pytest.mark.parametrize(
    ("calls", "names"),
    [
        (5, ["p50_ms"]),
        (49, ["p50_ms"]),
        (50, ["p50_ms", "p90_ms"]),
        (100, ["p50_ms", "p90_ms", "p95_ms"]),
        (500, ["p50_ms", "p90_ms", "p95_ms", "p99_ms"]),
    ],
)
def test_no_percentile_beyond_what_the_calls_support(calls, names):
    assert list(percentiles(np.arange(float(calls)))) == names


def test_speedup_is_reference_over_target_with_its_interval():
    rng = np.random.default_rng(0)
    target = [list(rng.normal(10, 0.3, 5)) for _ in range(40)]
    reference = [list(rng.normal(20, 0.6, 5)) for _ in range(40)]
    result = summarize(target, reference, batch=8)
    assert result["speedup"] == pytest.approx(2, rel=0.02)
    assert result["speedup_low"] < result["speedup"] < result["speedup_high"]
    assert result["throughput_per_s"] == pytest.approx(800, rel=0.02)
    assert result["calls"] == 200


def test_drift_that_hits_both_sides_cancels():
    """Both slow down threefold in the second half; a ratio of separate runs would see up to 3x."""
    drift = np.repeat([1.0, 3.0], 20)
    ratio, low, high = speedup_interval([[10 * d] for d in drift], [[20 * d] for d in drift])
    assert (ratio, low, high) == pytest.approx((2, 2, 2))


def test_the_ratio_lies_in_its_interval_even_where_few_turns_are_torn():
    """The median of all calls once lay outside the interval of the medians of turns."""
    target, reference = [[1.0] * 9, [50.0], [1.0], [60.0], [55.0]], [[100.0]] * 5
    ratio, low, high = speedup_interval(target, reference)
    assert low <= ratio <= high


POINTS = 6  # towers and batch sizes that take turns in the standard benchmark: the noise goes on in the others' turns


def own_noise(rng, turns):
    """Of each side of each turn, 3 %, and once in ten a neighbour that slows it down by a half on average."""
    return rng.normal(0, 0.03, (2, turns)) + (rng.random((2, turns)) < 0.1) * rng.exponential(0.5, (2, turns))


def shared_drift(rng, turns):
    """Both sides drift together by 3 % a turn, and in half of the benchmarks the clock drops for good."""
    drift = np.cumsum(rng.normal(0, 0.03, turns))
    drift[rng.integers(turns) :] += rng.choice([0, 0.4])
    return own_noise(rng, turns) + drift


def autoregressive(rng, turns, kept=0.8):
    """Besides, each side is slowed by what is kept to four fifths into the next turn of whatever point: AR(1), 3 %."""
    noise = rng.normal(0, 0.03, (2, turns))
    for turn in range(1, turns):
        noise[:, turn] = kept * noise[:, turn - 1] + np.sqrt(1 - kept**2) * noise[:, turn]
    return own_noise(rng, turns) + noise


def states(rng, turns, size):
    """Two states, each kept for ten turns on average."""
    redrawn = rng.random((2, turns)) < 0.2
    redrawn[:, 0] = True
    drawn = rng.random((2, turns)) < 0.5
    last = np.maximum.accumulate(np.where(redrawn, np.arange(turns), 0), 1)
    return size * np.take_along_axis(drawn, last, 1)


def clock_of_both(rng, turns):
    """The machine's clock switches between two states, 30 % apart."""
    return own_noise(rng, turns) + states(rng, turns, 0.3)[0]


def state_of_one(rng, turns):
    """Each side has two states of its own, 5 % apart, as where a neighbour shares its core for a while."""
    return own_noise(rng, turns) + states(rng, turns, 0.05)


LONGER = partial(autoregressive, kept=0.9)


def simulated(speedup, turns, seed, noise=shared_drift, points=POINTS):
    """The medians of one point's turns in a benchmark of so many, both sides."""
    slow = noise(np.random.default_rng(seed), turns * points)[:, ::points]
    target, reference = np.exp(slow + np.log([[1], [speedup]]))
    return target[:, None].tolist(), reference[:, None].tolist()


def intervals(speedup, turns, simulations=1000, **how):
    """Of as many benchmarks, [simulations, 2]."""
    return np.array([speedup_interval(*simulated(speedup, turns, seed, **how))[1:] for seed in range(simulations)])


def covered(found, truth):
    low, high = found.T
    return np.mean((low <= truth) & (high >= truth))


@pytest.mark.parametrize("turns", [LEAST_ROUNDS, 9, 15, 29, 40, 100])
def test_the_interval_covers_the_true_speedup_in_95_percent_of_1000_benchmarks(turns):
    assert 0.93 <= covered(intervals(1.7, turns), 1.7) <= 0.97


@pytest.mark.parametrize(
    ("noise", "turns"),
    [(autoregressive, 15), (autoregressive, 40), (LONGER, 100), (clock_of_both, 40), (state_of_one, 40)],
)
def test_noise_that_lasts_for_some_turns_leaves_the_interval_honest(noise, turns):
    assert 0.93 <= covered(intervals(1.7, turns, noise=noise), 1.7) <= 0.97


def test_turns_in_a_row_would_not_be():
    """Why towers and batch sizes take turns: of one point alone, the same noise is in most turns of a block."""
    assert covered(intervals(1.7, 40, noise=LONGER, points=1), 1.7) < 0.9


@pytest.mark.parametrize("noise", [shared_drift, clock_of_both])
def test_a_slow_down_of_5_percent_is_found_and_none_is_not(noise):
    slower, same = intervals(0.95, turns=40, noise=noise), intervals(1.0, turns=40, noise=noise)
    assert np.mean(slower[:, 1] < 1) > 0.95
    assert 0.93 <= covered(same, 1) <= 0.97


@pytest.mark.parametrize("turns", [15, 40])
def test_a_slow_down_as_large_as_is_said_to_be_detectable_is_found_in_most_benchmarks(turns):
    said = np.median([summarize(*simulated(1.0, turns, seed), 1)["detectable_slowdown"] for seed in range(300)])
    assert 0.03 < said < 0.09
    slower = intervals(1 - said, turns)
    assert 0.7 < np.mean(slower[:, 1] < 1) < 0.9


@pytest.mark.parametrize(
    ("turns", "low", "high"),
    [
        (5, 1.0, 5.0),  # the whole range, which covers 93.75 %
        (6, 1.3571, 5.6429),  # between [1, 6], 96.9 %, and [2, 5], 78.1 %
        (20, 6.2352, 14.7648),  # between [6, 15], 95.9 %, and [7, 14], 88.5 %
        (60, 14.3156, 46.6844),  # of 12 blocks of five, 3, 8, ... 58: between the 3rd, 96.1 %, and the 4th, 85.4 %
    ],
)
def test_the_interval_lies_between_two_blocks_that_the_sign_test_names(turns, low, high):
    """Logarithms of the ratios are 1, 2, 3...; the shares follow from the paper's formula by hand."""
    reference = [[float(np.exp(value))] for value in range(1, turns + 1)]
    found = speedup_interval([[1.0]] * turns, reference[::-1])
    assert np.log(found) == pytest.approx([(turns + 1) / 2, low, high], abs=1e-4)


class Recorder:
    """In a worker's place: every call of its inputs takes as long, and the requests are kept."""

    def __init__(self, ms):
        self.ms, self.asked = ms, []

    def ask(self, request):
        self.asked.append(request)
        return {"ms": [self.ms] * request["calls"]} if "calls" in request else {"ready": True}


def test_towers_and_batch_sizes_take_turns_until_each_has_its_time():
    points = [Point({"tower": tower, "batch": 1, "device": "cpu"}) for tower in ("vision", "text")]
    target, other = Recorder(5.0), Recorder(10.0)
    for point in points:
        point.warm_up(target, other, warmup=1)
    assert points[0].calls == (5, 3)  # 20 ms, and the first, which is not counted
    target.asked.clear()
    _take_turns(points, target, other, BenchmarkConfig(iterations=41, seconds=60))
    assert [ask["tower"] for ask in target.asked if "tower" in ask] == ["vision", "text"] * 11
    assert [len(times) for times in points[1].turns] == [4] * 11
    assert points[0].summary()["speedup"] == pytest.approx(2)


def test_a_target_is_timed_in_its_own_process(checkpoint, onnx_target):
    settings = BenchmarkConfig(batch_sizes=[1, 2], threads=1, warmup=1, seconds=0.05)
    result = measure(onnx_target, checkpoint, settings)
    assert set(result["towers"]) == {"vision", "text"}
    assert set(result["towers"]["vision"]) == {"1", "2"}
    row = result["towers"]["vision"]["1"]
    assert row["p50_ms"] > 0
    assert row["calls"] >= LEAST_ROUNDS
    assert 5 < result["memory_mb"] < 500  # ONNX Runtime and numpy, no PyTorch
    assert result["size_mb"] == pytest.approx(3.9, rel=0.1)


def test_a_target_that_cannot_run_is_unavailable_not_an_error(checkpoint, tmp_path):
    def refuse(folder):
        raise UnavailableError("no such library")

    build(tmp_path / "target", refuse, Target("ort", "fp16"))
    result = measure(tmp_path / "target", checkpoint, BenchmarkConfig())
    assert result == {"status": "unavailable", "reason": "no such library"}


READY = "print('{}', flush=True); input()"  # open, and has read one request
ENDINGS = {
    "os.kill(os.getpid(), 11)": "the process crashed with SIGSEGV",
    "os.kill(os.getpid(), 9)": "the process crashed with SIGKILL, as when memory runs out",
    "os.write(1, b'{'); os._exit(3)": "the process ended with exit code 3",
    "time.sleep(600)": "no answer within 2 s: the process hung and was killed",
}


COUNTING = """
from clip_deploy.worker import serve

made = []

class Rows:
    def tolist(self):
        return made

serve(lambda folder, threads: None, lambda encoder, request: made.append(request["batch"]) or Rows)
"""


def test_a_worker_keeps_the_inputs_that_it_has_made(tmp_path):
    """Or each turn would make them anew, which takes longer than the turn."""
    with Worker(tmp_path, 1, [sys.executable, "-c", COUNTING]) as worker:
        worker.wait()
        for batch in (1, 8, 1, 8):
            worker.ask({"tower": "vision", "batch": batch})
        assert worker.ask({"rows": True})["rows"] == [1, 8]


@pytest.mark.parametrize("fault", ENDINGS)
def test_a_timed_process_that_crashes_or_hangs_is_named(fault, tmp_path):
    program = [sys.executable, "-Sc", f"import os, time; {READY}; {fault}"]
    with Worker(tmp_path / "ort-fp32", 1, program, limit_s=2) as worker:
        worker.wait()
        with pytest.raises(UnavailableError) as caught:
            worker.ask({"memory": True})
    assert str(caught.value) == f"ort-fp32, while it was timed: {ENDINGS[fault]}"


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"benchmark\.batch_sizes is \[\]"):
        BenchmarkConfig(batch_sizes=[])
    with pytest.raises(ConfigError, match=r"benchmark\.threads is 0: it must be above 0"):
        BenchmarkConfig(threads=0)
    with pytest.raises(ConfigError, match=r"benchmark\.answer_seconds is 0: it must be above 0"):
        BenchmarkConfig(answer_seconds=0)
