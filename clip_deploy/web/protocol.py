"""uvicorn's HTTP/1.1 with bounds on a request's headers: it knows none itself (0.54), in size or in time."""

from asyncio import TimerHandle
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from clip_deploy.web.errors import RequestError
from clip_deploy.web.metrics import OTHER

MAX_HEADERS = 32_768  # bytes, with the URL
MAX_CONNECTIONS = 1_024
MAX_PIPELINED = 16  # requests of a connection that wait for the answer to another; uvicorn would collect them all
HEADERS_S = 10  # from a connection's beginning, or a request's first byte, to the end of its headers
LINGER_S = 5  # in which the rest of a refused body is thrown away: a client that still sends does not read the answer
UNREAD_S = 30  # after which an answer that its client does not read is given up, with its connection


class BoundedProtocol(HttpToolsProtocol):
    """A connection. Requests that break a bound are answered before the application sees them."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.header_bytes, self.is_in_headers, self.is_refused = 0, True, False
        self.timer: TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(RequestError(503, "too many connections: try again", retry_after_s=1))
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.is_refused:
            return
        if self.is_in_headers:
            if self.timer is None:
                self._await_headers()
            self.header_bytes += len(data)
        super().data_received(data)
        if self.is_in_headers and self.header_bytes > MAX_HEADERS:
            self._refuse(RequestError(431, f"the headers have more than {MAX_HEADERS:,} bytes"))

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self.is_in_headers, self.header_bytes = False, 0
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > MAX_HEADERS:
            self._refuse(RequestError(431, f"the headers have more than {MAX_HEADERS:,} bytes"))
        if len(self.pipeline) >= MAX_PIPELINED:
            self.is_refused = True
            self.transport.abort()  # an answer would be taken for that to the first of them
        if not self.is_refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_timer()
        self.is_in_headers = True
        if not self.is_refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(UNREAD_S, self._abort_if_unread)
        if not self.is_in_headers and not self.transport.is_closing():
            self.timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _unsupported_upgrade_warning(self) -> None:
        """It is answered as if it asked for none, which HTTP allows; uvicorn's advice is to install WebSockets."""

    def send_400_response(self, msg: str) -> None:
        self._refuse(RequestError(400, "this is not an HTTP/1.1 request", None, "invalid_http"))

    def _abort_if_unread(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _await_headers(self) -> None:
        self.timer = self.loop.call_later(HEADERS_S, self._late)

    def _late(self) -> None:
        if self.header_bytes:
            self._refuse(RequestError(408, f"the headers did not come within {HEADERS_S} s"))
        else:  # an answer to no request would be taken for that to the next one
            self.transport.close()

    def _stop_timer(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer = None

    def _refuse(self, refusal: RequestError) -> None:
        """Answer and hang up."""
        self._stop_timer()
        self.is_refused = True
        if self.transport.is_closing():
            return
        self.config.app.observe(OTHER, refusal.status, 0.0)  # type: ignore[union-attr] # an App, or NamedHosts
        body = orjson.dumps(refusal.body)
        fields = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        lines = [f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in (fields | refusal.headers).items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
