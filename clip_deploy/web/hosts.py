"""Which names a server on this machine answers to.

A page of the internet may have its own name resolve to 127.0.0.1, and is then, for the browser, of one origin with this
server (DNS rebinding). What tells it apart is that name, which the browser sends.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from clip_deploy.core.errors import DataError
from clip_deploy.web.errors import RequestError
from clip_deploy.web.metrics import OTHER
from clip_deploy.web.responses import refused

LOCAL = "localhost"
HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*", re.IGNORECASE)


class NamedHosts:
    """An application behind a check of the Host header: addresses, localhost and `names` are answered."""

    def __init__(self, app: ASGIApp, names: Sequence[str], observe: Callable[[str, int, float], None]) -> None:
        """`observe` is given the route, the status and the seconds of what is refused."""
        self.app, self.names, self.observe = app, {name.lower() for name in names} | {LOCAL}, observe
        self.is_known = lru_cache(maxsize=64)(self._is_known)  # a client always sends the same name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
            if not self.is_known(host):
                said = f"{host[:100]!r} is not a name of this server: use its address, or start it with --allow-host"
                self.observe(OTHER, 421, 0.0)
                await refused(RequestError(421, said, None, "unknown_host"))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name == "" or name in self.names or name.endswith(f".{LOCAL}") or is_address(name)


def check_hosts(option: str, names: Sequence[str]) -> None:
    """Raise DataError where one is no host's name or address, and would therefore never match."""
    for name in names:
        if not is_address(name) and not HOST.fullmatch(name):
            raise DataError(
                f"{option} {name!r} is not a host name: give the name alone, for example images.example.com, without "
                "scheme, port or path"
            )


def is_address(name: str) -> bool:
    """Whether a name is an IPv4 or IPv6 address."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def is_local(name: str) -> bool:
    """Whether only this machine reaches an address that is listened at."""
    return ip_address(name).is_loopback if is_address(name) else name == LOCAL
