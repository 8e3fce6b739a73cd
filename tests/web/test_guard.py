import asyncio

import pytest

from clip_deploy.web import guard as guard_module
from clip_deploy.web.errors import RequestError
from clip_deploy.web.guard import ClientLeftError, Guard


def late():
    return RequestError(503, "too long")


class Client:
    """What a server's `receive` says: nothing until it leaves."""

    def __init__(self):
        self.left, self.asked = asyncio.Event(), 0

    async def receive(self):
        self.asked += 1
        await self.left.wait()
        return {"type": "http.disconnect"}


def run(main):
    """What it returns for a client that is there; it leaves no task behind."""

    async def started():
        try:
            return await main(Client())
        finally:
            for _ in range(3):  # turns in which what was cancelled ends
                await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    return asyncio.run(started())


def test_an_answer_that_is_soon_there_starts_no_watch():
    async def main(client):
        with Guard(client.receive) as guard:
            guard.allow(10, late)
            await asyncio.sleep(0)
            guard.allow_watched(10, late)
            await asyncio.sleep(0)
        assert guard.timer.cancelled()
        assert guard.watch is None
        return client.asked

    assert run(main) == 0


def test_a_client_that_left_before_the_watch_began_is_seen(monkeypatch):
    monkeypatch.setattr(guard_module, "WATCH_S", 0.01)

    async def main(client):
        client.left.set()
        with Guard(client.receive) as guard:
            guard.allow_watched(10, late)
            await asyncio.sleep(20)

    with pytest.raises(ClientLeftError):
        run(main)


@pytest.mark.parametrize("watched", [False, True])
def test_what_takes_longer_than_allowed_is_cancelled(monkeypatch, watched):
    monkeypatch.setattr(guard_module, "WATCH_S", 0.01)
    was_cancelled = False

    async def main(client):
        nonlocal was_cancelled
        with Guard(client.receive) as guard:
            (guard.allow_watched if watched else guard.allow)(0.05, late)
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError:
                was_cancelled = True
                raise

    with pytest.raises(RequestError, match="too long"):
        run(main)
    assert was_cancelled


def test_what_was_allowed_before_does_not_end_what_follows():
    async def main(client):
        with Guard(client.receive) as guard:
            guard.allow(0.02, late)
            guard.allow(10, late)
            await asyncio.sleep(0.1)
        await asyncio.sleep(0)
        assert not asyncio.current_task().cancelling()
        return "done"

    assert run(main) == "done"


def test_a_task_that_the_server_cancels_stays_cancelled(monkeypatch):
    """Also where its time was over in the same turn of the event loop."""
    monkeypatch.setattr(guard_module, "WATCH_S", 0.01)

    async def main(client):
        async def guarded(is_late):
            with Guard(client.receive) as guard:
                guard.allow(10, late)
                entered.set()
                try:
                    await asyncio.sleep(20)
                finally:
                    if is_late:
                        guard._end(late())

        for is_late in (False, True):
            entered = asyncio.Event()
            task = asyncio.ensure_future(guarded(is_late))
            await entered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()

    run(main)
