"""What arrives, in batches: each row of an answer belongs to the request that asked for it.

A request is a Job. Its rows wait in queues that threads empty: threads that prepare images, and one thread a tower that
encodes. A queue is emptied in turns, a row of each job, so that a large request holds up nobody. What comes of the rows
goes to the event loop, which alone changes a job. An idle encoder takes what is there at once; it waits a few ms only
while images are being prepared, so that they become one batch.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from clip_deploy.web.errors import RequestError
from clip_deploy.web.metrics import TowerMetrics

logger = logging.getLogger(__name__)

RETRY_S = 1
ON_GPU = threading.Lock()  # CUDA graphs are recorded while no other thread of the process calls the GPU

Encode = Callable[[list[Any]], Sequence[Any]]


class WrongAnswerError(Exception):
    """An encoder gave other than one finite vector for each row."""


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
    job: Job
    number: int
    value: Any
    since: float  # perf_counter


class FairQueue:
    """Rows of jobs, taken in turns.

    Attributes:
        coming: rows that are being prepared for it.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.jobs: dict[Job, deque[Row]] = {}  # whose turn it is first
        self.count, self.coming, self.is_closed = 0, 0, False

    def put(self, rows: Sequence[Row], came: int = 0) -> None:
        """Add rows, of which `came` were expected."""
        with self.changed:
            self.coming -= came
            for row in rows:
                self.jobs.setdefault(row.job, deque()).append(row)
            self.count += len(rows)
            self.changed.notify(len(rows))

    def expect(self, rows: int) -> None:
        """So many more are coming, or, below zero, fewer."""
        with self.changed:
            self.coming += rows
            if rows < 0:
                self.changed.notify()

    def take(self, most: int, wait_s: float = 0.0) -> list[Row]:
        """Up to `most` rows as soon as there are any; up to wait_s later while more are coming. None once closed."""
        with self.changed:
            while not self.count and not self.is_closed:
                self.changed.wait()
            until = perf_counter() + wait_s
            while self.count < most and self.coming > 0 and (left := until - perf_counter()) > 0:
                self.changed.wait(left)
            return self._drawn(most)

    def _drawn(self, most: int) -> list[Row]:
        drawn: list[Row] = []
        while self.jobs and len(drawn) < most:
            job, rows = next(iter(self.jobs.items()))
            del self.jobs[job]
            drawn.append(rows.popleft())
            if rows:
                self.jobs[job] = rows
        self.count -= len(drawn)
        return drawn

    def drop(self, job: Job) -> int:
        """Take a job's rows out and say how many there were."""
        with self.changed:
            dropped = len(self.jobs.pop(job, ()))
            self.count -= dropped
            return dropped

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()


class Batcher:
    """One tower of a package: what is to be encoded waits here, and comes back as one vector a row.

    Attributes:
        held: rows of requests that wait for an answer.
    """

    def __init__(
        self,
        encode: Encode,
        most: int,
        max_queue: int,
        metrics: TowerMetrics,
        wait_s: float = 0.0,
        prepare: Callable[[Any], Any] | None = None,
        threads: int = 1,
        on_gpu: bool = False,
    ) -> None:
        """
        Args:
            encode: from a batch's rows to as many answers, of which the first part, or all, is a vector.
            most: rows of a batch.
            max_queue: rows that may wait.
            wait_s: how long a batch waits while rows are being prepared.
            prepare: what is done to each row first, by `threads` threads; its errors fail the row's job alone.
            on_gpu: whether it shares the GPU with other towers.
        """
        self.encode, self.most, self.max_queue, self.wait_s = encode, most, max_queue, wait_s
        self.prepare, self.metrics = prepare, metrics
        self.alone: AbstractContextManager[Any] = ON_GPU if on_gpu else nullcontext()
        self.raw, self.ready, self.held = FairQueue(), FairQueue(), 0
        targets = [self._encode_all] + [self._prepare_all] * (threads if prepare else 0)
        self.threads = [threading.Thread(target=target, daemon=True) for target in targets]

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self.loop = asyncio.get_running_loop()
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        for queue in (self.raw, self.ready):
            queue.close()
        for thread in self.threads:
            thread.join()

    async def __call__(self, values: Sequence[Any], is_bounded: bool = True) -> list[Any]:
        """Answers to `values`, in their order. If the caller is cancelled, what still waits is dropped.

        Raises:
            RequestError: too much waits already, unless `is_bounded` is False.
            Exception: what `prepare` or `encode` raised for one of them, or WrongAnswerError.
        """
        if is_bounded and self.held and self.held + len(values) > self.max_queue:
            raise RequestError(
                429, f"{self.held:,} wait already, and at most {self.max_queue:,} may: try again", None, None, RETRY_S
            )
        if not values:
            return []
        job, now = Job(len(values)), perf_counter()
        self._hold(len(values))
        rows = [Row(job, number, value, now) for number, value in enumerate(values)]
        if self.prepare:
            self.ready.expect(len(rows))
            self.raw.put(rows)
        else:
            self.ready.put(rows)
        try:
            return await job.future
        finally:
            job.is_over = True
            self._hold(-len(values))
            if job.missing:
                self.ready.drop(job)
                if dropped := self.raw.drop(job):
                    self.ready.expect(-dropped)

    def _hold(self, rows: int) -> None:
        self.held += rows
        self.metrics.held.inc(rows)

    def _prepare_all(self) -> None:
        assert self.prepare
        while rows := self.raw.take(1):
            row, start = rows[0], perf_counter()
            prepared = None if row.job.is_over else _tried(self.prepare, row.value)
            self.metrics.prepare.observe(perf_counter() - start)
            if row.job.is_over or isinstance(prepared, Exception):
                self.ready.expect(-1)
                self._settle([row], [prepared])
            else:
                self.ready.put([row._replace(value=prepared, since=perf_counter())], came=1)

    def _encode_all(self) -> None:
        while rows := self.ready.take(self.most, self.wait_s):
            start = perf_counter()
            with self.alone:
                answers = self._encoded([row.value for row in rows])
            self.metrics.observe_batch(len(rows), start - min(row.since for row in rows), perf_counter() - start)
            self._settle(rows, answers)

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
        vectors = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
        if not np.isfinite(np.stack(vectors)).all():
            raise WrongAnswerError("an embedding holds NaN or infinity")
        return answers

    def _settle(self, rows: Sequence[Row], answers: Sequence[Any]) -> None:
        def settle() -> None:
            for row, answer in zip(rows, answers, strict=True):
                row.job.settle(row.number, answer)

        self.loop.call_soon_threadsafe(settle)


def _tried(call: Callable[[Any], Any], value: Any) -> Any:
    """What it returns, or the exception that it raises: a thread that serves all must not end with one request."""
    try:
        return call(value)
    except Exception as error:
        return error
