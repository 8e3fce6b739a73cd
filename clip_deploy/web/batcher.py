"""What arrives, in batches: each row of an answer belongs to the request that asked for it.

A request is a Job. Its rows wait in queues, which a few threads empty: each prepares a row, or encodes a batch of what
is prepared, and one alone encodes at a time. A queue is emptied in turns, a row of each job, so that a large request
holds up nobody. What comes of the rows goes to the event loop, which alone changes a job. What is prepared is encoded
at once; it waits a few ms only while other rows are being prepared, so that they become one batch.

On a GPU one thread encodes and does nothing else: ONNX Runtime keeps the CUDA graphs that it records for each thread.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from clip_deploy.web.errors import RequestError
from clip_deploy.web.metrics import TowerMetrics

logger = logging.getLogger(__name__)

RETRY_S = 1
MAX_BATCH_BYTES = 2**28  # of prepared rows; where a graph resizes images itself, they are as large as they came
MAX_READY_BYTES = 2**29  # beyond it, nothing is prepared until something was encoded
ON_GPU = threading.Lock()  # CUDA graphs are recorded while no other thread of the process calls the GPU

Encode = Callable[[list[Any]], Sequence[Any]]


class WrongAnswerError(Exception):
    """An encoder gave other than one finite vector for each row."""


class PanicError(Exception):
    """What was raised and is no Exception: nothing that serves requests looks for it."""


class Job:
    """The rows of one request. Used by the event loop alone, but for `is_over`."""

    def __init__(self, rows: int) -> None:
        self.future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.answers: list[Any] = [None] * rows
        self.missing = rows
        self.is_over = False  # nobody waits for it any more

    def settle(self, row: int, answer: Any) -> None:
        if self.is_over:
            return
        self.answers[row] = answer
        self.missing -= 1
        if isinstance(answer, Exception):
            self.is_over = True
            if not self.future.done():
                self.future.set_exception(answer)
        elif not self.missing:
            self.is_over = True
            if not self.future.done():
                self.future.set_result(self.answers)


class Row(NamedTuple):
    """One text or image that waits for its batch."""

    job: Job
    number: int
    value: Any
    since: float  # perf_counter

    @property
    def bytes(self) -> int:
        """Of a prepared image."""
        return int(getattr(self.value, "nbytes", 0))


class FairQueue:
    """Rows of jobs, taken in turns. Its owner holds a lock."""

    def __init__(self) -> None:
        self.jobs: dict[Job, deque[Row]] = {}  # whose turn it is first
        self.count, self.bytes = 0, 0

    def put(self, row: Row) -> None:
        self.jobs.setdefault(row.job, deque()).append(row)
        self._count(1, row)

    def take(self, most: int) -> list[Row]:
        """Up to so many rows, or fewer where they have MAX_BATCH_BYTES."""
        taken: list[Row] = []
        held = 0
        while self.jobs and len(taken) < most and held < MAX_BATCH_BYTES:
            job, rows = next(iter(self.jobs.items()))
            del self.jobs[job]
            taken.append(rows.popleft())
            held += taken[-1].bytes
            if rows:
                self.jobs[job] = rows
        self._count(-1, *taken)
        return taken

    def drop(self, job: Job) -> None:
        """Take a job's rows out."""
        self._count(-1, *self.jobs.pop(job, ()))

    def _count(self, sign: int, *rows: Row) -> None:
        self.count += sign * len(rows)
        self.bytes += sign * sum(row.bytes for row in rows)


class Batcher:
    """One tower of a package: what is to be encoded waits here, and comes back as one vector a row.

    Attributes:
        held: rows of requests that wait for an answer.
        raw, ready: rows that are to be prepared, and to be encoded.
        preparing: rows that threads prepare now.
    """

    def __init__(
        self,
        encode: Encode,
        most: int,
        max_queue: int,
        metrics: TowerMetrics,
        wait_s: float = 0.0,
        prepare: Callable[[Any], Any] | None = None,
        threads: int = 0,
        on_gpu: bool = False,
        warm_up: Callable[[], object] | None = None,
    ) -> None:
        """
        Args:
            encode: from a batch's rows to as many answers, of which the first part, or all, is a vector; or a
                RequestError in the place of one.
            most: rows of a batch.
            max_queue: rows that may wait.
            wait_s: how long what is prepared waits for rows that are not.
            prepare: what is done to each row first; what it raises or returns as an exception fails the row's job.
            threads: that prepare, beside the one that encodes.
            on_gpu: whether it shares the GPU with other towers.
            warm_up: what the thread that encodes on a GPU does first, before `start` returns.
        """
        self.encode, self.most, self.max_queue, self.wait_s = encode, most, max_queue, wait_s
        self.prepare, self.metrics = prepare, metrics
        self.alone: AbstractContextManager[Any] = ON_GPU if on_gpu else nullcontext()
        self.held = 0
        self.lock = threading.Lock()  # for all that follows
        self.raw, self.ready, self.preparing = FairQueue(), FairQueue(), 0
        self.is_encoding, self.is_closed, self.ready_since = False, False, 0.0
        # Of each thread that waits a lock that wakes it; the last one, whose caches are warm, goes first.
        self.idle: list[threading.Lock] = []
        self.idle_encoder: list[threading.Lock] = [] if on_gpu else self.idle
        self.on_gpu, self.warm_up, self.is_warm = on_gpu, warm_up, threading.Event()
        targets = [self._work_on_gpu if on_gpu else self._work] + [partial(self._work, encodes=not on_gpu)] * threads
        self.threads = [threading.Thread(target=target, daemon=True) for target in targets]

    async def start(self) -> None:
        """Begin to work for the running event loop."""
        self.loop = asyncio.get_running_loop()
        for thread in self.threads:
            thread.start()
        if self.on_gpu:
            await self.loop.run_in_executor(None, self.is_warm.wait)

    def close(self) -> None:
        with self.lock:
            self.is_closed = True
            self._wake(len(self.threads))
            self._wake_encoder()
        for thread in self.threads:
            thread.join()

    async def __call__(self, values: Sequence[Any], is_bounded: bool = True) -> list[Any]:
        """Answers to `values`, in their order. If the caller is cancelled, what still waits is dropped.

        Raises:
            RequestError: too much waits already, unless `is_bounded` is False.
            Exception: what `prepare` or `encode` raised for one of them, or WrongAnswerError.
        """
        if is_bounded and self.held and self.held + len(values) > self.max_queue:
            said = f"{self.held:,} wait already, and at most {self.max_queue:,} may: try again"
            raise RequestError(429, said, retry_after_s=RETRY_S)
        if not values:
            return []
        job = Job(len(values))
        self._hold(len(values))
        try:
            self._put(job, values)
            return await job.future
        finally:
            job.is_over = True
            self._hold(-len(values))
            if job.missing:
                self._drop(job)

    def _hold(self, rows: int) -> None:
        self.held += rows
        self.metrics.held.inc(rows)

    def _put(self, job: Job, values: Sequence[Any]) -> None:
        now = perf_counter()
        with self.lock:
            for number, value in enumerate(values):
                row = Row(job, number, value, now)
                if self.prepare:
                    self.raw.put(row)
                else:
                    self._put_ready(row)
            if self.prepare:
                self._wake(len(values))
            else:
                self._wake_encoder()

    def _put_ready(self, row: Row) -> None:
        if not self.ready.count:
            self.ready_since = row.since
        self.ready.put(row)

    def _drop(self, job: Job) -> None:
        with self.lock:
            self.raw.drop(job)
            self.ready.drop(job)
            self._wake_encoder()  # nothing may be left to wait for

    def _wake(self, threads: int) -> None:
        for _ in range(min(threads, len(self.idle))):
            self.idle.pop().release()

    def _wake_encoder(self) -> None:
        if self.idle_encoder:
            self.idle_encoder.pop().release()

    def _work_on_gpu(self) -> None:
        """What the thread does that encodes there."""
        try:
            with self.alone:
                if self.warm_up:
                    self.warm_up()
        except BaseException:  # `start` waits for this thread, which goes on
            logger.exception("a tower could not be called at each of its batch sizes")
        self.is_warm.set()
        self._work(prepares=False)

    def _work(self, encodes: bool = True, prepares: bool = True) -> None:
        """What each thread does."""
        idle = self.idle if prepares else self.idle_encoder
        wake = threading.Lock()
        wake.acquire()
        while True:
            with self.lock:
                if self.is_closed:
                    return
                rows = self._batch() if encodes and self._is_due() else []
                row = self._raw_row() if prepares and not rows else None
                if not rows and not row:
                    idle.append(wake)
                    patience = self._patience_s() if encodes else -1
            if rows:
                self._encode_batch(rows)
            elif row:
                self._prepare_row(row)
            elif not wake.acquire(timeout=patience):
                self._stop_waiting(wake, idle)

    def _stop_waiting(self, wake: threading.Lock, idle: list[threading.Lock]) -> None:
        """Of a thread whose patience is over."""
        with self.lock:
            if wake in idle:
                idle.remove(wake)
            else:
                wake.acquire()  # it was woken at that moment

    def _is_due(self) -> bool:
        """Whether what is prepared is to be encoded now."""
        if not self.ready.count or self.is_encoding:
            return False
        if self.ready.count >= self.most or self.ready.bytes >= MAX_BATCH_BYTES:
            return True
        if not self.raw.count and not self.preparing:
            return True
        return perf_counter() >= self.ready_since + self.wait_s

    def _patience_s(self) -> float:
        """How long a thread may wait for another to wake it; -1 is for ever."""
        if not self.ready.count or self.is_encoding:
            return -1
        return max(0.0, self.ready_since + self.wait_s - perf_counter())

    def _batch(self) -> list[Row]:
        self.is_encoding = True
        rows = self.ready.take(self.most)
        self._wake(self.raw.count)  # where too much was ready, threads wait although there is something to prepare
        self.ready_since = perf_counter()  # of what is left
        return rows

    def _raw_row(self) -> Row | None:
        rows = self.raw.take(1) if self.ready.bytes < MAX_READY_BYTES else []
        self.preparing += len(rows)
        return rows[0] if rows else None

    def _prepare_row(self, row: Row) -> None:
        assert self.prepare
        start = perf_counter()
        prepared = None if row.job.is_over else _tried(self.prepare, row.value)
        self.metrics.prepare.observe(perf_counter() - start)
        is_wanted = not row.job.is_over and not isinstance(prepared, Exception)
        with self.lock:
            self.preparing -= 1
            if is_wanted:
                self._put_ready(row._replace(value=prepared, since=perf_counter()))
            if self.on_gpu:  # else this thread looks itself what is due
                self._wake_encoder()
        if isinstance(prepared, Exception):
            self._settle([row], [prepared])

    def _encode_batch(self, rows: list[Row]) -> None:
        start = perf_counter()
        try:
            with self.alone:
                answers = self._encoded([row.value for row in rows])
            self._settle(rows, answers)
        finally:
            with self.lock:
                self.is_encoding = False
        self.metrics.observe_batch(len(rows), start - min(row.since for row in rows), perf_counter() - start)

    def _encoded(self, values: list[Any]) -> Sequence[Any]:
        """An answer or an exception for each value. Where a batch fails, each is tried alone."""
        found = _tried(self._checked, values)
        if not isinstance(found, Exception):
            answers: Sequence[Any] = found
            return answers
        logger.error("a batch of %d failed: %s", len(values), found, exc_info=found)
        return [found] if len(values) == 1 else [self._encoded([value])[0] for value in values]

    def _checked(self, values: list[Any]) -> Sequence[Any]:
        answers = self.encode(values)
        if len(answers) != len(values):
            raise WrongAnswerError(f"{len(values)} rows were encoded, and {len(answers)} came back")
        found = [answer for answer in answers if not isinstance(answer, RequestError)]
        vectors = [answer[0] if isinstance(answer, tuple) else answer for answer in found]
        if vectors and not np.isfinite(np.stack(vectors)).all():
            raise WrongAnswerError("an embedding holds NaN or infinity")
        return answers

    def _settle(self, rows: Sequence[Row], answers: Sequence[Any]) -> None:
        def settle() -> None:
            for row, answer in zip(rows, answers, strict=True):
                row.job.settle(row.number, answer)

        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self.loop.call_soon_threadsafe(settle)


def _tried(call: Callable[[Any], Any], value: Any) -> Any:
    """What it returns, or the exception that it raises: a thread that serves all must not end with one request."""
    try:
        return call(value)
    except Exception as error:
        return error
    except BaseException as error:  # so a panic of a library in Rust, as tokenizers, comes
        return PanicError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
