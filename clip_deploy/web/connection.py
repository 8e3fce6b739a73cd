"""A client's end of HTTP/1.1 that costs little: one connection, kept alive, whole requests as bytes."""

import asyncio
import re
from typing import NamedTuple

END = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
CLOSES = re.compile(rb"\r\nconnection: *close\r\n", re.IGNORECASE)


class Answer(NamedTuple):
    """An HTTP status and the body that came with it."""

    status: int
    body: bytes


class Connection:
    """Opened when a request needs it, and again after the server closed it."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.transport: asyncio.Transport | None = None
        self.received, self.needed = bytearray(), len(END)
        self.answer: asyncio.Future[Answer] | None = None

    async def ask(self, request: bytes) -> Answer:
        """Raises ConnectionError where the connection ends, or what comes is no answer. One call at a time."""
        transport = await self._opened()
        self.answer = asyncio.get_running_loop().create_future()
        transport.write(request)
        return await self.answer

    async def leave(self, request: bytes) -> None:
        """Send it, or a part of it, and hang up at once."""
        transport = await self._opened()
        transport.write(request)
        await asyncio.sleep(0)
        self.close()

    def close(self) -> None:
        if self.transport:
            self.transport.abort()
            self.transport = None

    async def _opened(self) -> asyncio.Transport:
        if self.transport is None or self.transport.is_closing():
            loop = asyncio.get_running_loop()
            self.received, self.needed, self.answer = bytearray(), len(END), None
            self.transport, _ = await loop.create_connection(lambda: _Bound(self), self.host, self.port)
        return self.transport

    def take(self, data: bytes) -> None:
        """What came; the answer is whole once `needed` bytes are there."""
        self.received += data
        if len(self.received) < self.needed:
            return
        end = self.received.find(END)
        if end < 0:
            return
        head = bytes(self.received[: end + len(END)])
        length = LENGTH.search(head)
        if not length or not head.startswith(b"HTTP/1.1 "):
            self.end(ConnectionError(f"no HTTP/1.1 answer with a length: {head[:60]!r}"))
            return
        self.needed = end + len(END) + int(length[1])
        if len(self.received) < self.needed:
            return
        body, more = bytes(self.received[end + len(END) : self.needed]), len(self.received) > self.needed
        self.received, self.needed = bytearray(), len(END)
        if more or self.answer is None or self.answer.done():
            self.end(ConnectionError("more came than was asked for"))
            return
        if CLOSES.search(head):
            self.close()
        self.answer.set_result(Answer(int(head[9:12]), body))

    def end(self, error: Exception) -> None:
        self.close()
        if self.answer and not self.answer.done():
            self.answer.set_exception(error)


class _Bound(asyncio.Protocol):
    """One transport's events for its Connection, until that has another transport."""

    def __init__(self, owner: Connection) -> None:
        self.owner = owner
        self.transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.owner.transport is None or self.owner.transport is self.transport:
            self.owner.take(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.owner.transport is self.transport:
            self.owner.end(error or ConnectionError("the server closed the connection"))
