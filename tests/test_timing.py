import numpy as np
import pytest

from clip_deploy.core.artifact import Target, build
from clip_deploy.core.config import BenchmarkConfig
from clip_deploy.core.errors import ConfigError, UnavailableError
from clip_deploy.timing import Worker, measure, percentiles, speedup_interval, summarize


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
    result = summarize(target, reference, batch=8, seed=0)
    assert result["speedup"] == pytest.approx(2, rel=0.02)
    assert result["speedup_low"] < result["speedup"] < result["speedup_high"]
    assert result["throughput_per_s"] == pytest.approx(800, rel=0.02)
    assert result["calls"] == 200


def test_drift_that_hits_both_sides_cancels():
    """Both slow down threefold in the second half; a ratio of separate runs would see up to 3x."""
    drift = np.repeat([1.0, 3.0], 20)
    ratio, low, high = speedup_interval([[10 * d] for d in drift], [[20 * d] for d in drift], seed=0)
    assert low <= 2 <= high
    assert ratio == 2


def test_the_ratio_lies_in_its_interval_even_where_few_turns_are_torn():
    """The median of all calls once lay outside the interval of the medians of turns."""
    target, reference = [[1.0] * 9, [50.0], [1.0], [60.0], [55.0]], [[100.0]] * 5
    ratio, low, high = speedup_interval(target, reference, seed=0)
    assert low <= ratio <= high


def test_a_target_is_timed_in_its_own_process(checkpoint, onnx_target):
    settings = BenchmarkConfig(batch_sizes=[1, 2], threads=1, warmup=1, seconds=0.05)
    result = measure(onnx_target, checkpoint, settings, seed=0)
    assert set(result["towers"]) == {"vision", "text"}
    assert set(result["towers"]["vision"]) == {"1", "2"}
    row = result["towers"]["vision"]["1"]
    assert row["p50_ms"] > 0
    assert row["calls"] >= 5
    assert 5 < result["memory_mb"] < 500  # ONNX Runtime and numpy, no PyTorch
    assert result["size_mb"] == pytest.approx(3.9, rel=0.1)


def test_a_target_that_cannot_run_is_unavailable_not_an_error(checkpoint, tmp_path):
    def refuse(folder):
        raise UnavailableError("no such library")

    build(tmp_path / "target", refuse, Target("ort", "fp16"))
    result = measure(tmp_path / "target", checkpoint, BenchmarkConfig(), seed=0)
    assert result == {"status": "unavailable", "reason": "no such library"}


def test_a_worker_that_dies_is_reported(onnx_target):
    with Worker(onnx_target, threads=1) as worker:
        worker.wait()
        worker.process.kill()
        with pytest.raises(UnavailableError, match="onnx-fp32 stopped with exit code -9 while it was timed"):
            worker.ask({"memory": True})


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"benchmark\.batch_sizes is \[\]"):
        BenchmarkConfig(batch_sizes=[])
    with pytest.raises(ConfigError, match=r"benchmark\.threads is 0: it must be above 0"):
        BenchmarkConfig(threads=0)
