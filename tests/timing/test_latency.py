import sys
from functools import partial

import numpy as np
import pytest

from clip_deploy.core.artifact import Target, build
from clip_deploy.core.config import BenchmarkConfig
from clip_deploy.core.errors import ConfigError, UnavailableError
from clip_deploy.core.records import Benchmark
from clip_deploy.timing.latency import (
    MIN_ROUNDS,
    LatencyWorker,
    measure,
    percentiles,
    sign_test_ranks,
    speedup_interval,
    summarize,
)
from clip_deploy.timing.latency_worker import DeviceCall


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
    assert result.speedup == pytest.approx(2, rel=0.02)
    assert result.speedup_low < result.speedup < result.speedup_high
    assert result.throughput_per_s == pytest.approx(800, rel=0.02)
    assert result.calls == 200


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


def own_noise(rng, turns):
    """Of each side of each turn, 3 %, and once in ten a neighbour that slows it down by a half on average."""
    return rng.normal(0, 0.03, (2, turns)) + (rng.random((2, turns)) < 0.1) * rng.exponential(0.5, (2, turns))


def shared_drift(rng, turns):
    """Both sides drift together by 3 % a turn, and in half of the benchmarks the clock drops for good."""
    drift = np.cumsum(rng.normal(0, 0.03, turns))
    drift[rng.integers(turns) :] += rng.choice([0, 0.4])
    return own_noise(rng, turns) + drift


def autoregressive(rng, turns, kept=0.3):
    """Besides, each side is slowed by what is partly kept into its next turn: AR(1) of 3 %.

    The ratios of real turns have a correlation of 0.1 with the next one, seldom above 0.3 (reports/noise.md).
    """
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


LASTING = partial(autoregressive, kept=0.9)


def simulated(speedup, turns, seed, noise=shared_drift):
    """The medians of a benchmark's turns, both sides."""
    target, reference = np.exp(noise(np.random.default_rng(seed), turns) + np.log([[1], [speedup]]))
    return target[:, None].tolist(), reference[:, None].tolist()


def intervals(speedup, turns, simulations=1000, **how):
    """Of as many benchmarks, [simulations, 2]."""
    return np.array([speedup_interval(*simulated(speedup, turns, seed, **how))[1:] for seed in range(simulations)])


def covered(found, truth):
    low, high = found.T
    return np.mean((low <= truth) & (high >= truth))


@pytest.mark.parametrize("turns", [MIN_ROUNDS, 9, 15, 29, 40, 100])
def test_the_interval_covers_the_true_speedup_in_95_percent_of_1000_benchmarks(turns):
    assert 0.93 <= covered(intervals(1.7, turns), 1.7) <= 0.97


@pytest.mark.parametrize("turns", [15, 40, 100])
@pytest.mark.parametrize("noise", [autoregressive, clock_of_both])
def test_noise_as_turns_have_it_leaves_the_interval_honest(noise, turns):
    assert 0.93 <= covered(intervals(1.7, turns, noise=noise), 1.7) <= 0.97


def test_blocks_of_turns_bear_noise_that_lasts_better_and_not_for_ever():
    """What speedup_interval says of itself: noise of one side that outlasts a block is not covered."""
    found = covered(intervals(1.7, 40, noise=LASTING), 1.7)
    one_by_one = [by_turn(*simulated(1.7, 40, seed, noise=LASTING)) for seed in range(1000)]
    assert covered(np.array(one_by_one), 1.7) + 0.1 < found < 0.93


def by_turn(turns, reference):
    """The interval of the same test over single turns."""
    ratios = np.sort(np.log(np.squeeze(reference)) - np.log(np.squeeze(turns)))
    inner, _ = sign_test_ranks(len(ratios))
    return np.exp([ratios[inner], ratios[-1 - inner]])


@pytest.mark.parametrize("noise", [shared_drift, clock_of_both])
def test_a_slow_down_of_5_percent_is_found(noise):
    """And none is not: of the same 40 turns the interval is honest, as said above."""
    assert np.mean(intervals(0.95, turns=40, noise=noise)[:, 1] < 1) > 0.95


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


def test_a_target_is_timed_in_its_own_process(checkpoint, onnx_target):
    settings = BenchmarkConfig(batch_sizes=[1, 2], threads=1, warmup=1, seconds=0.05)
    result = measure(onnx_target, checkpoint, settings)
    assert set(result.towers) == {"vision", "text"}
    assert set(result.towers["vision"]) == {1, 2}
    row = result.towers["vision"][1]
    assert row.p50_ms > 0
    assert row.calls >= MIN_ROUNDS
    assert 5 < result.memory_mb < 500  # ONNX Runtime and numpy, no PyTorch
    assert result.size_mb == pytest.approx(3.9, rel=0.1)


def test_a_target_that_cannot_run_is_unavailable_not_an_error(checkpoint, tmp_path):
    def refuse(folder):
        raise UnavailableError("no such library")

    build(tmp_path / "target", refuse, Target("ort", "fp16"))
    result = measure(tmp_path / "target", checkpoint, BenchmarkConfig())
    assert result == Benchmark(status="unavailable", reason="no such library")


READY = "print('{}', flush=True); input()"  # open, and has read one request
ENDINGS = {
    "os.kill(os.getpid(), 11)": "the process crashed with SIGSEGV",
    "os.kill(os.getpid(), 9)": "the process crashed with SIGKILL, which happens when memory runs out",
    "os.write(1, b'{'); os._exit(3)": "the process ended with exit code 3",
    "time.sleep(600)": "no answer within 2 s: the process hung and was killed",
}


@pytest.mark.parametrize("fault", ENDINGS)
def test_a_timed_process_that_crashes_or_hangs_is_named(fault, tmp_path):
    program = [sys.executable, "-Sc", f"import os, time; {READY}; {fault}"]
    with LatencyWorker(tmp_path / "ort-fp32", 1, program, timeout_s=2) as worker:
        worker.wait()
        with pytest.raises(UnavailableError) as caught:
            worker.ask({"memory": True})
    assert str(caught.value) == f"ort-fp32, while it was timed: {ENDINGS[fault]}"


def test_texts_longer_than_the_model_reads_are_refused_before_anything_is_timed(onnx_target, checkpoint):
    with pytest.raises(ConfigError, match=r"sequence_length is 33, and the model reads texts of up to 32 tokens: give"):
        measure(onnx_target, checkpoint, BenchmarkConfig(sequence_length=33))


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"benchmark\.batch_sizes is \[\]"):
        BenchmarkConfig(batch_sizes=[])
    with pytest.raises(ConfigError, match=r"benchmark\.threads is 0: give 1 to 1024"):
        BenchmarkConfig(threads=0)
    with pytest.raises(ConfigError, match=r"benchmark\.timeout_s is 0: it must be above 0"):
        BenchmarkConfig(timeout_s=0)


def test_calls_that_are_queued_are_waited_for_once():
    done, clock = [], iter([1.0, 1.5])
    call = DeviceCall(lambda: done.append("asked"), lambda: done.append("waited"))
    assert call.queued_ms(5, lambda: next(clock)) == 100.0
    assert done == ["asked"] * 5 + ["waited"]
