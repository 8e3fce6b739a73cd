"""Time a target against the reference, call by call in turn, each in a process of its own.

Both processes are opened once and take turns: one is stopped (SIGSTOP) while the other runs, so that the threads of one
library never spin beside the other's. Drift of the machine hits both alike and cancels in the ratio.
"""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from threading import Timer
from time import monotonic
from typing import Any

import numpy as np
from tqdm import tqdm

from clip_deploy.core.artifact import Target, failure, read_target, size_bytes
from clip_deploy.core.config import BenchmarkConfig
from clip_deploy.core.errors import ConfigError, DeployError, UnavailableError
from clip_deploy.core.records import Benchmark, Power, Timing
from clip_deploy.core.subprocesses import ending, hung
from clip_deploy.timing import nvml

ROUND_MS = 20.0  # each side's turn lasts about so long
LONG_MS = 100.0  # a call so long warms the caches for itself; a turn of shorter ones begins with one not counted
MIN_ROUNDS = 8  # turns of each side; with fewer than 6, no interval covers 95 % (speedup_interval)
MIN_BLOCKS = 10  # of turns, where there are so many: fewer are longer, and less alike, but find less
QUEUES, MIN_QUEUED = 5, 4  # turns of calls without a wait, and calls of one
BEYOND = 5  # a percentile is stated where at least so many calls lie beyond it
CONFIDENCE = 0.95
PROGRAM = (sys.executable, "-m", "clip_deploy.timing.latency_worker")

# glibc returns large buffers to the kernel after each call or keeps them, as its thresholds happened to move: the same
# program ran 0.6 to 1.2 times as fast as itself. Fixed, it keeps them: mallopt(3), M_MMAP_THRESHOLD, M_TRIM_THRESHOLD.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


def measure(folder: Path, reference: Path, settings: BenchmarkConfig) -> Benchmark:
    """Time both towers of `folder` at every batch size, interleaved with `reference`.

    The reference gets pixel_values in any case. Power, matrix rate and the reference's work are measured on a GPU only.
    """
    described = read_target(folder)
    if described.unavailable:
        return Benchmark(status="unavailable", reason=described.unavailable)
    if settings.sequence_length and 0 < described.model.context_length < settings.sequence_length:
        raise ConfigError(
            f"benchmark.sequence_length is {settings.sequence_length}, and the model reads texts of up to "
            f"{described.model.context_length} tokens: give no more, or null for all"
        )
    try:
        with _worker(folder, settings) as target, _worker(reference, settings) as other:
            target.wait()
            other.wait()
            return _measured(folder, target, other, described, settings)
    except UnavailableError as error:
        return Benchmark(status="unavailable", reason=str(error))
    except Exception as error:  # the other rows are timed all the same
        return Benchmark(status="unavailable", reason=failure(error))


def _measured(
    folder: Path, target: "LatencyWorker", other: "LatencyWorker", described: Target, settings: BenchmarkConfig
) -> Benchmark:
    clock, on_gpu = nvml.clock_mhz(), described.device == "cuda"
    towers, memory_bytes, gpu_bytes = _measure_towers(target, other, described, settings)
    return Benchmark(
        status="measured",
        threads=settings.threads,
        preprocessed_size=settings.image_size if described.image_input == "images" else [],
        towers=towers,
        memory_mb=None if memory_bytes is None else memory_bytes / 1e6,
        gpu_memory_mb=None if gpu_bytes is None else gpu_bytes / 1e6,
        power=_power(target, described, towers["vision"], settings, clock) if on_gpu else None,
        matrix_tflops=other.ask({"matrix_rate": True})["tflops"] if on_gpu else None,
        size_mb=size_bytes(folder) / 1e6,
    )


def _worker(folder: Path, settings: BenchmarkConfig) -> "LatencyWorker":
    return LatencyWorker(folder, settings.threads, timeout_s=settings.timeout_s)


def _measure_towers(
    target: "LatencyWorker", other: "LatencyWorker", described: Target, settings: BenchmarkConfig
) -> tuple[dict[str, dict[int, Timing]], int | None, int | None]:
    """The timings by tower and batch size, and bytes of memory and of the GPU's at the smallest batch."""
    requests = [
        shape_request(tower, batch, described, settings)
        for batch in settings.batch_sizes
        for tower in ("vision", "text")
    ]
    towers: dict[str, dict[int, Timing]] = {"vision": {}, "text": {}}
    memory: dict[str, int | None] = {}
    for request in tqdm(requests, desc="benchmark", disable=None):
        towers[request["tower"]][request["batch"]] = measure_one(target, other, request, settings)
        if request["batch"] == settings.batch_sizes[0]:
            memory = target.ask({"memory": True})
    return towers, memory.get("bytes"), memory.get("gpu_bytes")


def shape_request(tower: str, batch: int, described: Target, settings: BenchmarkConfig) -> dict[str, Any]:
    """What a worker is asked to prepare before it is timed: one tower at one batch size, as latency_worker reads it."""
    return {
        "tower": tower,
        "batch": batch,
        "image_size": described.model.image_size,
        "patches": described.model.patches,
        "photo_size": settings.image_size,
        "tokens": settings.sequence_length or described.model.context_length,
        "words": sorted({word for text in described.model.example_texts["input_ids"] for word in text}),
        "device": described.device,
    }


def _power(
    target: "LatencyWorker", described: Target, sizes: dict[int, Timing], settings: BenchmarkConfig, clock: int | None
) -> Power | None:
    """Images encoded without a pause at the best batch size: what the whole GPU takes, by NVML's counter of energy.

    None without NVML. `clock` is that before the benchmark, in MHz.
    """
    batch = max(sizes, key=lambda size: sizes[size].throughput_per_s)
    target.ask(shape_request("vision", batch, described, settings))
    target.ask({"calls": max(1, settings.warmup)})
    started, before = monotonic(), nvml.energy_j()
    calls = target.ask({"seconds": settings.power_s})["calls"]
    seconds, after = monotonic() - started, nvml.energy_j()
    if before is None or after is None:
        return None
    return Power(
        batch=batch,
        mean_w=(after - before) / seconds,
        j_per_1000_images=1000 * (after - before) / (calls * batch),
        clock_mhz=[clock, nvml.clock_mhz()],
    )


def measure_one(
    target: "LatencyWorker", other: "LatencyWorker", request: dict[str, Any], settings: BenchmarkConfig
) -> Timing:
    """Time one tower at one batch size: the target's turns and the reference's alternate, each of about ROUND_MS."""
    for worker in (target, other):
        worker.ask(request)
    on_gpu = request["device"] == "cuda"
    gflop = other.ask({"flop": True})["flop"] / 1e9 if on_gpu else None
    calls = {worker: calls_per_turn(worker, settings.warmup) for worker in (target, other)}
    turns: dict[LatencyWorker, list[list[float]]] = {target: [], other: []}
    started = monotonic()
    while True:
        pair = (target, other) if len(turns[target]) % 2 else (other, target)
        for worker in pair:
            times = worker.ask({"calls": calls[worker]})["ms"]
            turns[worker].append(times[1:] if len(times) > 1 else times)  # the first call warms the caches again
        count = sum(map(len, turns[target]))
        over = monotonic() - started > 2 * settings.seconds or count >= settings.iterations
        if over and len(turns[target]) >= MIN_ROUNDS:
            queued = _queued_ms(target, calls[target]) if on_gpu else None
            return replace(summarize(turns[target], turns[other], request["batch"]), gflop=gflop, queued_ms=queued)


def _queued_ms(worker: "LatencyWorker", calls: int) -> float:
    """Milliseconds of a call that need not wait for the one before: the median of QUEUES turns."""
    found: float = median(worker.ask({"queued": max(MIN_QUEUED, calls)})["ms"] for _ in range(QUEUES))
    return found


def calls_per_turn(worker: "LatencyWorker", warmup: int) -> int:
    """Warm up, and find how many calls fill a turn: one of them is not counted."""
    typical = float(np.median(worker.ask({"calls": max(1, warmup)})["ms"]))
    return 1 if typical > LONG_MS else 1 + math.ceil(ROUND_MS / typical)


def summarize(turns: list[list[float]], reference: list[list[float]], batch: int) -> Timing:
    """Percentiles, throughput and speed-up of one tower at one batch size, from the ms of each turn's calls."""
    times = np.concatenate(turns)
    speedup, low, high = speedup_interval(turns, reference)
    _, p50_low, p50_high = median_interval(np.array([median(turn) for turn in turns]))
    return Timing(
        **percentiles(times),
        p50_low_ms=p50_low,
        p50_high_ms=p50_high,
        calls=len(times),
        throughput_per_s=1000 * batch * len(times) / float(times.sum()),
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        reference_p50_ms=float(np.median(np.concatenate(reference))),
    )


def percentiles(times: np.ndarray) -> dict[str, float]:
    """p50, p90, p95 and p99 in ms, each only where at least BEYOND calls lie beyond it."""
    supported = [q for q in (50, 90, 95, 99) if q == 50 or len(times) * (100 - q) / 100 >= BEYOND]
    return {f"p{q}_ms": float(np.percentile(times, q)) for q in supported}


def speedup_interval(turns: list[list[float]], reference: list[list[float]]) -> tuple[float, float, float]:
    """median_interval of the turns' ratios of both sides' medians, reference over target.

    The two sides of a turn run within milliseconds of each other, so drift and changes of frequency cancel in their
    ratio. It covers noise that both sides share, however long it lasts, and noise of one side that is gone within a
    block or before the next one. It does not cover what stays as it is for the whole benchmark: where two processes'
    memory and threads happened to come to lie makes a program differ from itself. report.read_rows widens it by that.
    """
    ours, theirs = (np.array([median(times) for times in side]) for side in (turns, reference))
    return median_interval(theirs / ours)


def median_interval(found: np.ndarray) -> tuple[float, float, float]:
    """Median over blocks of turns of what was found in each, a positive number, and its 95 % interval.

    What slows a turn often lasts for several, which then are less news than they seem: so turns are taken together in
    blocks of an odd number, as long as MIN_BLOCKS allow, and a block counts as the median of its turns. The interval
    is that of the sign test over the blocks, which holds for any distribution, interpolated between two of them to
    reach 95 % (Hettmansperger and Sheather, Statistics & Probability Letters 4 (1986) 75-79). Five blocks or fewer are
    too few for 95 %: their whole range is returned, which covers in 1 - 2 / 2^blocks of cases.
    """
    logs = np.sort([np.median(block) for block in blocks(np.log(found))])
    inner, share = sign_test_ranks(len(logs))
    outer = max(inner - 1, 0)
    low = (1 - share) * logs[outer] + share * logs[inner]
    high = (1 - share) * logs[-1 - outer] + share * logs[-1 - inner]
    return math.exp(np.median(logs)), math.exp(low), math.exp(high)


def blocks(found: np.ndarray) -> list[np.ndarray]:
    """Consecutive turns, an odd number in most blocks: the median of two is their mean, which one stall moves."""
    size = max(1, len(found) // MIN_BLOCKS)
    return np.array_split(found, len(found) // (size - 1 + size % 2))


def sign_test_ranks(count: int) -> tuple[int, float]:
    """Where the 95 % interval of a median lies among `count` sorted values.

    Returns:
        (k, share): the lower end lies `share` of the way from value k - 1 to value k, counted from 0, and the upper end
        likewise from the top; (0, 1.0) is the whole range.
    """
    cover = [1 - 2 * sum(math.comb(count, below) for below in range(k + 1)) / 2**count for k in range((count + 1) // 2)]
    k = next(k for k, covered in enumerate(cover) if covered < CONFIDENCE)
    if k == 0:
        return 0, 1.0
    spare = (cover[k - 1] - CONFIDENCE) / (cover[k - 1] - cover[k])
    return k, (count - k) * spare / (k + (count - 2 * k) * spare)


def thread_variables(threads: int) -> dict[str, str]:
    """The environment variables that set the pools of a process's libraries."""
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


class LatencyWorker:
    """A worker process, stopped except while it answers.

    `program` is a Python and its arguments that answers as latency_worker does; it is killed where an answer takes
    longer than `limit_s` seconds. What it does not answer is raised as UnavailableError.
    """

    def __init__(
        self, folder: Path, threads: int, program: Sequence[str] = PROGRAM, timeout_s: float | None = None
    ) -> None:
        self.name, self.timeout_s, self.late = folder.name, timeout_s, False
        self.process = subprocess.Popen(
            [*program, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **thread_variables(threads), **ALLOCATOR},
        )

    def wait(self) -> None:
        """Wait until the target is open; both sides open theirs at the same time."""
        self._read()
        self._signal("SIGSTOP")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer, while every other worker is stopped."""
        self._signal("SIGCONT")
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return self._read()
        except BrokenPipeError as error:
            raise self._died() from error
        finally:
            self._signal("SIGSTOP")

    def _read(self) -> dict[str, Any]:
        line = self._line()
        if not line.endswith("\n"):  # the process died before or within its answer
            raise self._died()
        answer = json.loads(line)
        if "error" in answer:
            raise UnavailableError(answer["error"])
        found: dict[str, Any] = answer
        return found

    def _line(self) -> str:
        watch = Timer(self.timeout_s, self._end_late) if self.timeout_s else None
        if watch:
            watch.start()
        try:
            return self.process.stdout.readline() if self.process.stdout else ""
        finally:
            if watch:
                watch.cancel()

    def _end_late(self) -> None:
        self.late = True
        self.process.kill()

    def _died(self) -> DeployError:
        how = hung(self.timeout_s) if self.late else f"the process {ending(self.process.wait())}"
        return UnavailableError(f"{self.name}, while it was timed: {how}")

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self.process.poll() is None:
            self.process.send_signal(getattr(signal, name))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> "LatencyWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
