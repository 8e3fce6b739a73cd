import asyncio
import socket
import ssl
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from clip_deploy.web import fetch
from clip_deploy.web.api import Picture, Text
from clip_deploy.web.errors import RequestError
from clip_deploy.web.fetch import Fetcher, is_public

HOST = "images.example.com"
URL = f"https://{HOST}/a.png?b=c"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        *(
            (address, False)
            for address in (
                *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
                *("224.0.0.1", "255.255.255.255", "::1", "fe80::1%eth0", "fd00::1", "ff02::1", "::"),
                *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:a::1"),
            )
        ),
    ],
)
def test_addresses_of_the_internet_are_told_from_all_others(address, public):
    assert is_public(address) is public


def fetched(*urls, hosts=(HOST,), max_held=10_000):
    """What is behind URLs, within 1,000 bytes a request."""

    async def main():
        fetcher = Fetcher(hosts, 1000, max_held)
        pictures = [Picture(url, f"input[{row}].image") for row, url in enumerate(urls)]
        try:
            async with fetcher.fetched([Text("a"), *pictures]) as items:
                assert items[0] == Text("a")
                assert fetcher.held == sum(len(item.content) for item in items[1:])
                return [item.content for item in items[1:]]
        finally:
            assert fetcher.held == 0

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://other.example.com/a.png", "host other.example.com is not among those"),
        (f"http://{HOST}/a.png", "by https alone"),
        (f"file://{HOST}/etc/hostname", "by https alone"),
        (f"https://{HOST}:8443/a.png", "from its own port"),
        (f"https://user:word@{HOST}/a.png", "without a password"),
        (f"https://{HOST}.evil.com/", "is not among those"),
        (f"https://evil.com#@{HOST}/", "is not among those"),
        (f"https://{HOST}:99999/", "is not a URL"),
        ("https://[::1/", "is not a URL"),
        ("https://", "is not a URL .it names no host"),
    ],
)
def test_urls_that_are_not_to_be_fetched_are_refused_before_anything_is_resolved(monkeypatch, url, said):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(RequestError, match=said) as refused:
        fetched(url)
    assert (refused.value.status, refused.value.code) == (400, "image_url_refused")
    assert refused.value.param == "input[0].image"


def test_without_hosts_no_url_is_fetched():
    with pytest.raises(RequestError, match="URLs of images are not fetched by this server"):
        fetched(URL, hosts=())


def resolve(monkeypatch, *addresses):
    """The DNS's answers, one call after the other."""
    answers, asked = iter(addresses), []

    def getaddrinfo(host, port, *_, **__):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["169.254.169.254"], ["93.184.215.14", "10.0.0.1"], []])
def test_a_name_that_leads_into_a_private_network_is_refused(monkeypatch, addresses):
    asked = resolve(monkeypatch, addresses)
    with pytest.raises(RequestError, match=f"host {HOST} has an address that is not public"):
        fetched(URL)
    assert asked == [HOST]


@contextmanager
def answering(monkeypatch, answer, seconds=10, addresses=(["93.184.215.14"], ["127.0.0.1"])):
    """A server that is taken for the public one; `answer` gets each connection. Yields what was asked of it."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(65_536))
                    answer(connection)

        async def connect(address, port, ssl, server_hostname, limit):
            """What the real one does, but for TLS, for which there is no certificate."""
            assert (address, port, server_hostname) == ("93.184.215.14", 443, HOST)
            return await asyncio.streams.open_connection("127.0.0.1", listening.getsockname()[1], limit=limit)

        thread = threading.Thread(target=serve)
        thread.start()
        resolve(monkeypatch, *addresses)
        monkeypatch.setattr(asyncio, "open_connection", connect)
        monkeypatch.setattr(fetch, "TIMEOUT_S", seconds)
        try:
            yield asked
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    "content",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nimage",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nima\r\n2\r\nge\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nimage",
    ],
)
def test_an_image_is_fetched_from_the_address_that_was_checked(monkeypatch, content):
    with answering(monkeypatch, lambda connection: connection.sendall(content)) as asked:
        assert fetched(URL) == [b"image"]
    head = b"GET /a.png?b=c HTTP/1.1\r\nHost: images.example.com\r\nConnection: close\r\nAccept: image/*\r\n\r\n"
    assert asked == [head]


def test_the_images_of_a_request_and_of_all_requests_are_bounded_together(monkeypatch):
    public, content = (["93.184.215.14"],) * 2, b"HTTP/1.1 200 OK\r\nContent-Length: 600\r\n\r\n" + b"a" * 600
    with answering(monkeypatch, send(content), addresses=public), pytest.raises(RequestError) as refused:
        fetched(URL, f"{URL}2")
    assert refused.value.status == 400
    assert "the images of this request have more than 1,000 bytes" in refused.value.message
    with answering(monkeypatch, send(content), addresses=public), pytest.raises(RequestError) as refused:
        fetched(URL, max_held=500)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 1)


def trickle(connection):
    """An answer's headers, which never end."""
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"A: b\r\n")
            time.sleep(0.05)
    except OSError:
        pass


def send(content):
    def sent(connection):
        with suppress(OSError):
            connection.sendall(content)

    return sent


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (send(b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/\r\n\r\n"), "answered 302: redirects are not"),
        (send(b"HTTP/1.1 404 No\r\n\r\n"), "answered 404: 200 is wanted"),
        (send(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n"), "more than 1,000 bytes"),
        (send(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), "more than 1,000 bytes"),
        (send(b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 2000), "more than 1,000 bytes"),
        (send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n"), "more than 1,000 bytes"),
        (send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nim"), "fetched .its host refused or ended the connection"),
        (send(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10_000), "fetched .its host's answer is no HTTP, or its headers"),
        (send(b"hello\r\n\r\n"), "fetched .its host's answer is no HTTP"),
        (send(b""), "fetched .its host refused or ended the connection"),
    ],
)
def test_what_is_no_image_within_the_bounds_is_refused(monkeypatch, answer, said):
    with answering(monkeypatch, answer), pytest.raises(RequestError, match=said):
        fetched(URL)


def test_an_answer_that_trickles_is_given_up(monkeypatch):
    with answering(monkeypatch, trickle, seconds=0.5), pytest.raises(RequestError, match=r"did not come within 0.5 s"):
        fetched(URL)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (socket.gaierror(-2, "Name or service not known"), "its host's name is not known here"),
        (ssl.SSLCertVerificationError("self-signed"), "its host's certificate or TLS is not accepted"),
        (ConnectionRefusedError(), "its host refused or ended the connection"),
        (OSError(101, "Network is unreachable"), "its host cannot be reached"),
    ],
)
def test_why_an_image_does_not_come_is_said_without_addresses(monkeypatch, error, said):
    async def connect(*_, **__):
        raise error

    resolve(monkeypatch, ["93.184.215.14"])
    monkeypatch.setattr(asyncio, "open_connection", connect)
    with pytest.raises(RequestError) as refused:
        fetched(URL)
    assert refused.value.message == f"input[0].image: the image could not be fetched ({said})"


def test_tls_is_checked(monkeypatch):
    """By the system's certificates and the URL's name, though the connection goes to an address."""
    seen = {}

    async def connect(address, port, ssl, server_hostname, limit):
        seen.update(context=ssl, name=server_hostname)
        raise ConnectionRefusedError

    resolve(monkeypatch, ["93.184.215.14"])
    monkeypatch.setattr(asyncio, "open_connection", connect)
    with pytest.raises(RequestError, match="could not be fetched"):
        fetched(URL)
    assert seen["name"] == HOST
    assert seen["context"].check_hostname
    assert seen["context"].verify_mode == ssl.CERT_REQUIRED
