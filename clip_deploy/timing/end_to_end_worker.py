"""A process of its own that feeds one target from JPEG bytes and times the flow.

    python -m clip_deploy.timing.end_to_end_worker

Reads a pickled Job from standard input and answers one JSON line on standard output: its row of the report, or
{"status": "unavailable", "reason": ...}.
"""

import json
import math
import pickle
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_deploy.core.config import BenchmarkConfig, EndToEndConfig, GateLimits
from clip_deploy.core.errors import DeployError
from clip_deploy.core.parsing import plain
from clip_deploy.core.records import FeedTiming, FlowBatch, Measured
from clip_deploy.core.similarity import similarity
from clip_deploy.core.subprocesses import die_with_parent
from clip_deploy.data.preprocessed import Prepared, batches
from clip_deploy.evaluate import accuracy
from clip_deploy.evaluate.embeddings import Embeddings
from clip_deploy.evaluate.gates import check_gate
from clip_deploy.runtimes import Encoder, open_encoder
from clip_deploy.timing.input_pipelines import Feed, open_feed
from clip_deploy.timing.latency_worker import answer_stream, reason, timed

if TYPE_CHECKING:
    from clip_deploy.core.preprocessing import Preprocessing

MIN_COSINE = 0.99  # below it a feed gives other pixels than the checkpoint's processor: its speed decides nothing
MIN_CALLS = 3  # of each part alone


@dataclass
class FeedJob:
    """One feed into one target.

    Attributes:
        jpegs: the photos, in memory.
        reference: what the checkpoint's own processor leads to: images [photos, dimension], and the evaluation set's
            texts.
        questions: labels of the photos, and classes or captions of the evaluation set; without its images.
        precision, gate: of the target: what its embeddings through the feed are held to.
    """

    feed: str
    folder: Path
    preprocessing: "Preprocessing"
    jpegs: list[bytes]
    reference: Embeddings
    questions: Prepared
    precision: str
    gate: GateLimits
    benchmark: BenchmarkConfig
    settings: EndToEndConfig
    trained: bool = True
    seed: int = 0


def main() -> None:
    """Measure the feed that stdin names (a pickle), and print what was found as one line of JSON."""
    die_with_parent()
    answers = answer_stream()
    try:
        row = measure_feed(pickle.load(sys.stdin.buffer))
    except Exception as error:  # of a library: they share no base class
        print(json.dumps(plain(FeedTiming("unavailable", reason(error)))), file=answers)
        if not isinstance(error, DeployError):
            raise
    else:
        print(json.dumps(plain(row)), file=answers)


def measure_feed(job: FeedJob) -> FeedTiming:
    """Time the flow at every batch size, and each of its parts alone."""
    encoder = open_encoder(job.folder, job.benchmark.threads)
    feed = open_feed(job.feed, job.preprocessing, getattr(encoder, "takes_device_tensors", False))
    measured = judge(_embeddings(feed, encoder, job.jpegs), job)
    status, reason = check_embeddings(measured, job)
    workers = feed.batch_workers or job.settings.workers or job.benchmark.threads
    found = {batch: measure_batch(feed, encoder, job, batch, workers) for batch in job.benchmark.batch_sizes}
    return FeedTiming(
        status,
        reason,
        cosine_min=measured.parity["vision"].cosine_min,
        top1_drop=measured.zero_shot.top1_drop if measured.zero_shot else None,
        flips=measured.flips,
        workers=workers,
        through_host=bool(feed.batch_workers) and not getattr(encoder, "takes_device_tensors", False),
        best_batch=max(found, key=lambda batch: found[batch].images_per_s),
        batches=found,
    )


def judge(images: np.ndarray, job: FeedJob) -> Measured:
    """What the feed costs: its embeddings [photos, dimension] and answers against the checkpoint's own processor's."""
    finite = np.nan_to_num(images, nan=0.0, posinf=0.0, neginf=0.0)
    actual, questions = replace(job.reference, images=finite), job.questions
    classes = questions.contents.classes
    return Measured(
        parity={"vision": similarity(images, job.reference.images)},
        shapes={},
        zero_shot=accuracy.zero_shot(actual, job.reference, questions, job.seed) if classes else None,
        flips=accuracy.flips(actual, job.reference, questions),
        evaluation=questions.identity,
    )


def check_embeddings(found: Measured, job: FeedJob) -> tuple[str, str | None]:
    """Status of a feed, and a reason: "wrong" below MIN_COSINE, "fail" where it misses its target's gate."""
    cosine = found.parity["vision"].cosine_min
    if not cosine >= MIN_COSINE:
        why = "the embeddings are not those of the checkpoint's own processor"
        return "wrong", f"cosine {cosine:.4f} < {MIN_COSINE}: {why}"
    missed = check_gate(found, job.trained, job.gate, job.precision)
    return ("fail", "; ".join(missed)) if missed else ("measured", None)


def _embeddings(feed: Feed, encoder: Encoder, jpegs: list[bytes]) -> np.ndarray:
    parts = [jpegs[rows] for rows in batches(len(jpegs), 8)]
    return np.concatenate([encoder.encode_images(feed.preprocess(feed.decode(part))) for part in parts])


def measure_batch(feed: Feed, encoder: Encoder, job: FeedJob, batch: int, workers: int) -> FlowBatch:
    """The flow at one batch size, and its parts with the machine to themselves."""
    with closing(prefetched(feed, job.jpegs, batch, workers)) as inputs:
        for _ in range(1 + job.benchmark.warmup):
            encoder.encode_images(next(inputs))
        rates = [pass_rate(inputs, encoder, batch, job.settings.seconds) for _ in range(job.settings.passes)]
    parts = parts_alone(feed, encoder, job.jpegs, batch, job.settings.seconds / 2)
    return FlowBatch(float(np.median(rates)), min(rates), max(rates), **parts)


def prefetched(feed: Feed, jpegs: list[bytes], batch: int, workers: int) -> Generator[Any, None, None]:
    """Batches of inputs without end: a pool makes the next ones while the caller encodes this one."""
    depth = max(2, math.ceil(2 * workers / batch))  # batches under way: no worker is idle at batch 1 either
    photos = cycle(jpegs)
    waiting: deque[list[Any]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            while len(waiting) < depth:
                jobs = _jobs(feed, list(islice(photos, batch)))
                waiting.append([pool.submit(lambda job: feed.preprocess(feed.decode(job)), job) for job in jobs])
            yield _joined([part.result() for part in waiting.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(feed: Feed, photos: list[bytes]) -> list[list[bytes]]:
    return [photos] if feed.batch_workers else [[photo] for photo in photos]


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def pass_rate(inputs: Generator[Any, None, None], encoder: Encoder, batch: int, seconds: float) -> float:
    """Images per second of a flow that runs on, from one encoded batch to another at least `seconds` later."""
    images, start = 0, perf_counter()
    while not images or perf_counter() - start < seconds:
        encoder.encode_images(next(inputs))
        images += batch
    return images / (perf_counter() - start)


def parts_alone(feed: Feed, encoder: Encoder, jpegs: list[bytes], batch: int, seconds: float) -> dict[str, float]:
    """Milliseconds of one image in each part, as one worker does it; to encode is to copy into a batch as well."""
    jobs = _jobs(feed, list(islice(cycle(jpegs), batch)))
    images = [feed.decode(job) for job in jobs]
    inputs = [feed.preprocess(job) for job in images]
    each = len(jobs[0])
    return {
        "decode_ms": alone_ms(feed.decode, jobs, seconds) / each,
        "preprocess_ms": alone_ms(feed.preprocess, images, seconds) / each,
        "encode_ms": alone_ms(lambda parts: encoder.encode_images(_joined(parts)), [inputs], seconds) / batch,
    }


def alone_ms(call: Callable[[Any], Any], arguments: Sequence[Any], seconds: float) -> float:
    """Median milliseconds of a call over its arguments, in turn, for about so long."""
    times: list[float] = []
    start = perf_counter()
    for argument in cycle(arguments):
        times.append(timed(lambda argument=argument: call(argument), perf_counter))  # type: ignore[misc]
        if len(times) >= MIN_CALLS and perf_counter() - start > seconds:
            break
    return float(np.median(times))


if __name__ == "__main__":
    main()
