"""What ends a request before its answer is there: its time is over, or its client has left."""

import asyncio
from collections.abc import Callable
from types import TracebackType

from starlette.types import Receive

WATCH_S = 0.25  # most answers are there before, and cost no task that watches


class ClientLeftError(Exception):
    """Nobody is there to read the answer."""


class Guard:
    """Of the running task, for what runs `with` it: cancels that, and raises why in the place of CancelledError.

    One timer serves both bounds in turn; a task that watches for the client begins after WATCH_S of work.
    """

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
        self.timer: asyncio.TimerHandle | None = None
        self.watch: asyncio.Task[None] | None = None
        self.reason: Exception | None = None

    def __enter__(self) -> "Guard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_timer()
        if self.watch:
            self.watch.cancel()
        if self.reason and self.task and kind is asyncio.CancelledError and not self.task.uncancel():
            raise self.reason from None

    def allow(self, seconds: float, late: Callable[[], Exception]) -> None:
        """Give what follows so long, in the place of what was allowed before; `late` makes the error."""
        self._stop_timer()
        self.timer = self.loop.call_later(seconds, lambda: self._end(late()))

    def allow_watched(self, seconds: float, late: Callable[[], Exception]) -> None:
        """The same, and raise ClientLeftError when the client leaves; its body must be read."""
        self._stop_timer()
        self.timer = self.loop.call_later(WATCH_S, self._begin_watch, seconds - WATCH_S, late)

    def _begin_watch(self, seconds: float, late: Callable[[], Exception]) -> None:
        self.watch = self.loop.create_task(self._watched())
        self.allow(seconds, late)

    async def _watched(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self._end(ClientLeftError())

    def _end(self, reason: Exception) -> None:
        if self.task and not self.reason:
            self.reason = reason
            self.task.cancel()

    def _stop_timer(self) -> None:
        if self.timer:
            self.timer.cancel()
