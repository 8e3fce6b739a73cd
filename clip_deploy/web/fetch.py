"""Images behind URLs: only of hosts that the server's owner named, and never of a private network.

https alone. The name is resolved once, and the connection goes to the address that was checked, so that a second answer
of the DNS cannot lead elsewhere. No redirect is followed, and size and time are bounded.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from http.client import parse_headers
from io import BytesIO
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from clip_deploy.web.api import Fetched, Item, Picture
from clip_deploy.web.errors import RequestError, bad

TIMEOUT_S = 10
AT_ONCE = 16
MAX_HEAD = 16_384  # bytes of an answer's headers
PORT = 443
NAT64 = ip_network("64:ff9b::/96")  # IPv4 addresses, private ones too, as IPv6


class Fetcher:
    """Attributes: held: bytes of images of running requests."""

    def __init__(self, hosts: Sequence[str], max_bytes: int, max_held: int) -> None:
        """
        Args:
            max_bytes: of all images of one request.
            max_held: of all running requests.
        """
        self.hosts, self.max_bytes, self.max_held, self.held = {host.lower() for host in hosts}, max_bytes, max_held, 0
        self.at_once = asyncio.Semaphore(AT_ONCE)

    @cached_property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    @asynccontextmanager
    async def fetched(self, items: Sequence[Item]) -> AsyncIterator[list[Item]]:
        """The same items, with the content behind each URL in its place.

        Raises RequestError where one is not to be fetched or does not come, or too much is held.
        """
        urls = [item for item in items if isinstance(item, Picture) and is_url(item.source)]
        if not urls:  # to gather nothing takes a turn of the event loop
            yield list(items)
            return
        for picture in urls:
            self._check(picture)
        budget = Budget(self)
        tasks = {picture: asyncio.ensure_future(self._fetch(picture, budget)) for picture in urls}
        try:
            await asyncio.gather(*tasks.values())
            yield [
                Fetched(tasks[item].result(), item.param) if isinstance(item, Picture) and item in tasks else item
                for item in items
            ]
        finally:
            for task in tasks.values():
                task.cancel()
            self.held -= budget.taken

    def _check(self, picture: Picture) -> None:
        if not self.hosts:
            raise _refusal(picture, "URLs of images are not fetched by this server: send the image as base64")
        try:
            url = urlsplit(picture.source)
            host, port, named = url.hostname, url.port, url.username
        except ValueError as error:
            raise _refusal(picture, f"is not a URL ({error})") from error
        if url.scheme != "https" or port not in (None, PORT) or named is not None:
            raise _refusal(picture, "images are fetched by https alone, from its own port and without a password")
        if not host:
            raise _refusal(picture, "is not a URL (it names no host)")
        if host not in self.hosts:
            raise _refusal(picture, f"host {host} is not among those that this server fetches from")

    async def _fetch(self, picture: Picture, budget: "Budget") -> bytes:
        try:
            async with self.at_once, asyncio.timeout(TIMEOUT_S):
                return await self._get(picture, budget)
        except TimeoutError:
            raise _refusal(picture, f"the image did not come within {TIMEOUT_S} s") from None
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise _refusal(picture, f"the image could not be fetched ({_reason(error)})") from error

    async def _get(self, picture: Picture, budget: "Budget") -> bytes:
        url = urlsplit(picture.source)
        host = url.hostname or ""
        address = await self._address(picture, host)
        reader, writer = await asyncio.open_connection(
            address, PORT, ssl=self.tls, server_hostname=host, limit=MAX_HEAD
        )
        try:
            target = (url.path or "/") + (f"?{url.query}" if url.query else "")
            if not target.isascii() or not target.isprintable() or " " in target:
                raise _refusal(picture, "the URL has letters that must be written as %xx")
            writer.write(
                f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nAccept: image/*\r\n\r\n".encode()
            )
            return await self._body(picture, reader, budget)
        finally:
            writer.close()

    async def _address(self, picture: Picture, host: str) -> str:
        """A public address of a host, which is the one that is connected to."""
        found = await asyncio.get_running_loop().getaddrinfo(host, PORT, proto=6)
        addresses = [str(place[4][0]) for place in found]
        if not addresses or not all(is_public(address) for address in addresses):
            raise _refusal(picture, f"host {host} has an address that is not public")
        return addresses[0]

    async def _body(self, picture: Picture, reader: asyncio.StreamReader, budget: "Budget") -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        line, _, fields = head.partition(b"\r\n")
        status = int(b" ".join(line.split()[1:2]))
        if status != 200:
            said = "redirects are not followed" if 300 <= status < 400 else "200 is wanted"
            raise _refusal(picture, f"the image's server answered {status}: {said}")
        headers = parse_headers(BytesIO(fields))
        if "chunked" in headers.get("Transfer-Encoding", "").lower():
            return await _chunks(picture, reader, budget)
        if (length := headers.get("Content-Length")) is not None:
            budget.take(picture, int(length))
            return await reader.readexactly(int(length))
        content = bytearray()
        while part := await reader.read(65_536):
            budget.take(picture, len(part))
            content += part
        return bytes(content)


async def _chunks(picture: Picture, reader: asyncio.StreamReader, budget: "Budget") -> bytes:
    content = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        budget.take(picture, size)
        content += await reader.readexactly(size)
        await reader.readexactly(2)
    return bytes(content)


class Budget:
    """Bytes that one request has fetched."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.fetcher, self.taken = fetcher, 0

    def take(self, picture: Picture, size: int) -> None:
        """Raise RequestError where there are not so many left."""
        fetcher = self.fetcher
        if not 0 <= size <= fetcher.max_bytes - self.taken:
            raise _refusal(picture, f"the images of this request have more than {fetcher.max_bytes:,} bytes")
        if fetcher.held + size > fetcher.max_held:
            raise RequestError(429, "too many large images at once: try again", picture.param, retry_after_s=1)
        self.taken += size
        fetcher.held += size


def _reason(error: Exception) -> str:
    """In a client's words, without addresses."""
    if isinstance(error, socket.gaierror):
        return "its host's name is not known here"
    if isinstance(error, ssl.SSLError):
        return "its host's certificate or TLS is not accepted"
    if isinstance(error, ConnectionError | asyncio.IncompleteReadError):
        return "its host refused or ended the connection"
    if isinstance(error, OSError):
        return "its host cannot be reached"
    return "its host's answer is no HTTP, or its headers are too long"


def is_url(source: str) -> bool:
    """Whether an image is given by its address, and not as base64 or a data URI."""
    return not source.startswith("data:") and "://" in source[:16]


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet: not to this machine, its networks, or a provider's metadata."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        inner: IPv4Address | None = found.ipv4_mapped or found.sixtofour
        if found in NAT64 or found.teredo or (inner and not is_public(str(inner))):
            return False
    return found.is_global and not found.is_multicast


def _refusal(picture: Picture, message: str) -> RequestError:
    return bad(f"{picture.param}: {message}", picture.param, "image_url_refused")
