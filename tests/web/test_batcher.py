import asyncio
import threading
import time

import numpy as np
import pytest

from clip_deploy.web import batcher as batcher_module
from clip_deploy.web.batcher import Batcher, PanicError, WrongAnswerError
from clip_deploy.web.errors import RequestError
from clip_deploy.web.metrics import Metrics, TowerMetrics


class Tower:
    """An encoder whose vectors are its rows' numbers, and what it was given."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()
        self.go.set()

    def __call__(self, values):
        self.batches.append(list(values))
        self.go.wait(20)
        return [np.array([float(value)]) for value in values]


def run(main, encode, **options):
    """What a coroutine on a started batcher returns."""

    async def started():
        settings = {"most": 4, "max_queue": 100, "metrics": TowerMetrics(Metrics(), "model", "vision"), **options}
        batcher = Batcher(encode, **settings)
        await batcher.start()
        try:
            return await main(batcher)
        finally:
            batcher.close()

    return asyncio.run(started())


async def until(holds):
    while not holds():
        await asyncio.sleep(0.001)


def test_every_job_gets_its_own_answers_in_its_order():
    tower, rng = Tower(), np.random.default_rng(0)

    def slow(value):
        time.sleep(float(rng.random()) / 1000)
        return value

    async def main(batcher):
        asked = [[100 * job + row for row in range(1 + job % 7)] for job in range(60)]
        return asked, await asyncio.gather(*map(batcher, asked))

    images = {"prepare": slow, "threads": 3, "wait_s": 0.002}
    for options in ({}, {"on_gpu": True}, images, images | {"on_gpu": True}):
        asked, found = run(main, tower, max_queue=1000, **options)
        assert [[float(row[0]) for row in rows] for rows in found] == asked
    assert max(map(len, tower.batches)) == 4


def test_on_a_gpu_one_thread_encodes_and_warms_up_before_anything_else():
    threads = []

    def encode(values):
        threads.append(threading.get_ident())
        return [np.array([float(value)]) for value in values]

    def prepare(value):
        assert threading.get_ident() != threads[0]
        time.sleep(0.001)
        return value

    async def main(batcher):
        assert len(threads) == 1
        return await batcher(list(range(50)))

    found = run(main, encode, prepare=prepare, threads=3, on_gpu=True, warm_up=lambda: encode([0]))
    assert [float(row[0]) for row in found] == list(range(50))
    assert len(set(threads)) == 1


def test_a_large_job_holds_up_nobody():
    tower = Tower()
    tower.go.clear()

    async def main(batcher):
        first = asyncio.ensure_future(batcher([0]))
        await until(lambda: tower.batches)
        jobs = [
            asyncio.ensure_future(batcher(list(range(first, first + count)))) for first, count in ((10, 8), (50, 2))
        ]
        await until(lambda: batcher.held == 11)
        tower.go.set()
        await asyncio.gather(first, *jobs)

    run(main, tower)
    assert tower.batches == [[0], [10, 50, 11, 51], [12, 13, 14, 15], [16, 17]]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_is_prepared_waits_for_what_is_not_but_not_long(on_gpu):
    tower, slow = Tower(), threading.Event()

    def prepare(value):
        if value == 9:
            slow.wait(20)
        else:
            time.sleep(0.02)
        return value

    async def main(batcher):
        late = asyncio.ensure_future(batcher([9]))
        await until(lambda: batcher.preparing)
        await batcher([1, 2])  # comes back although 9 is still being prepared
        slow.set()
        await late

    run(main, tower, prepare=prepare, threads=3, wait_s=0.5, on_gpu=on_gpu)
    assert sorted(map(sorted, tower.batches)) == [[1, 2], [9]]


def test_what_is_prepared_is_bounded_in_bytes(monkeypatch):
    """As where a graph resizes images itself, and they stay as large as they came."""
    monkeypatch.setattr(batcher_module, "MAX_BATCH_BYTES", 1000)
    monkeypatch.setattr(batcher_module, "MAX_READY_BYTES", 2000)
    tower = Tower()
    tower.go.clear()

    def encode(images):
        return tower([image[0] for image in images])

    async def main(batcher):
        job = asyncio.ensure_future(batcher(list(range(20))))
        await until(lambda: tower.batches and batcher.ready.bytes >= 2000)
        await asyncio.sleep(0.05)
        assert batcher.ready.bytes <= 2000 + 3 * 500
        tower.go.set()
        found = await job
        assert (batcher.ready.bytes, batcher.raw.count) == (0, 0)
        return [float(row[0]) for row in found]

    found = run(main, encode, prepare=lambda value: np.full(125, value, np.float32), threads=3, most=50)
    assert found == list(range(20))
    assert max(map(len, tower.batches)) == 2


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_cancelled_job_leaves_nothing_behind(on_gpu):
    tower = Tower()
    tower.go.clear()

    async def main(batcher):
        first = asyncio.ensure_future(batcher([0]))
        await until(lambda: tower.batches)
        left = asyncio.ensure_future(batcher([1, 2, 3]))
        await until(lambda: batcher.held == 4)
        left.cancel()
        await until(left.done)
        assert (batcher.held, batcher.ready.count) == (1, 0)
        tower.go.set()
        await asyncio.gather(first, batcher([4]))
        assert batcher.held == 0

    run(main, tower, on_gpu=on_gpu)
    assert tower.batches == [[0], [4]]


def test_more_than_the_queue_holds_is_refused_but_one_job_may_fill_it():
    async def main(batcher):
        running = asyncio.ensure_future(batcher([1, 2, 3, 4, 5, 6]))
        await until(lambda: batcher.held)
        with pytest.raises(RequestError) as refused:
            await batcher([7])
        assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
        unbounded = asyncio.ensure_future(batcher([8], is_bounded=False))
        tower.go.set()
        return await running, await unbounded

    tower = Tower()
    tower.go.clear()
    found, alone = run(main, tower, max_queue=5)
    assert [float(row[0]) for row in found + alone] == [1, 2, 3, 4, 5, 6, 8]


class Panic(BaseException):
    """As pyo3's, which a library in Rust raises."""


def panic(_):
    raise Panic("no threads")


@pytest.mark.parametrize(
    ("bad", "error"),
    [(lambda _: 1 / 0, ZeroDivisionError), (lambda _: [float("nan")], WrongAnswerError), (panic, PanicError)],
)
def test_a_row_that_fails_in_a_batch_fails_alone(bad, error):
    tower = Tower()

    def encode(values):
        return [np.array(bad(value)) if value == 3 else row for value, row in zip(values, tower(values), strict=True)]

    async def main(batcher):
        tower.go.clear()
        first = asyncio.ensure_future(batcher([0]))
        await until(lambda: tower.batches)
        jobs = [asyncio.ensure_future(batcher([value])) for value in (1, 2, 3, 4)]
        await until(lambda: batcher.held == 5)
        tower.go.set()
        return await asyncio.gather(first, *jobs, return_exceptions=True)

    found = run(main, encode)
    assert [float(row[0][0]) for row in found[:3] + found[4:]] == [0, 1, 2, 4]
    assert isinstance(found[3], error)


@pytest.mark.parametrize("encode", [lambda values: [np.zeros(1)] * (len(values) + 1), lambda values: []])
def test_another_number_of_answers_than_rows_is_no_answer(encode):
    async def main(batcher):
        with pytest.raises(WrongAnswerError, match="rows were encoded, and"):
            await batcher([1, 2])

    run(main, encode)


def test_what_cannot_be_prepared_fails_its_job_at_once():
    tower = Tower()

    def prepare(value):
        return ValueError("bad") if value == 2 else value

    async def main(batcher):
        with pytest.raises(ValueError, match="bad"):
            await batcher([1, 2, 3])
        assert batcher.held == 0
        return await batcher([4])

    assert float(run(main, tower, prepare=prepare, threads=1)[0][0]) == 4
