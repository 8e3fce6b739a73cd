"""What the server does when it has too much to do, held up at the encoder by the tests."""

import logging
import socket
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection

import numpy as np
import pytest
from PIL import Image
from support.web import encoded, request, served_here, vectors, wait_until

from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.web import app as web_app
from clip_deploy.web import protocol
from clip_deploy.web.app import create_app
from clip_deploy.web.settings import Settings

GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Held:
    """A server whose encoder of texts waits.

    Attributes:
        go: until this is set.
        batches: texts that it was given.
    """

    def __init__(self, server, api):
        self.server, self.api, self.served = server, api, api.models.served[0]
        self.go, self.batches, self.encode = threading.Event(), [], self.served.texts.encode
        self.served.texts.encode = self._encode

    def _encode(self, texts):
        self.batches.append(list(texts))
        self.go.wait(20)
        return self.encode(texts)

    def embed(self, *texts):
        return self.server.post("/v1/embeddings", {"input": list(texts)})


@pytest.fixture
def held(package, monkeypatch):
    """A function that opens one with other settings."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)

    @contextmanager
    def opened(**changes):
        settings = Settings(packages=(str(package),), drain_s=0, **changes)
        with warnings.catch_warnings():
            app = create_app(settings)
            with served_here(app, settings) as server:
                found = Held(server, app.state.api)
                try:
                    yield found
                finally:
                    found.go.set()

    return opened


@pytest.fixture(scope="module")
def classifier(package):
    return ZeroShotClassifier.open(package, threads=2)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as opened:
        yield opened


def rows(answer):
    status, found = answer
    assert status == 200, found
    return vectors([item["embedding"] for item in found["data"]])


def test_a_full_queue_is_told_and_answers_again_later(held, pool, classifier):
    with held(max_queue=4) as busy:
        running = pool.submit(busy.embed, "a", "b", "c", "d")
        wait_until(lambda: busy.batches)
        status, headers, found = busy.server.ask(
            "POST", "/v1/embeddings", b'{"input": "e"}', {"content-type": "application/json"}
        )
        assert (status, headers["retry-after"]) == (429, "1")
        assert found["error"]["type"] == "rate_limit_error"
        assert "4 wait already, and at most 4 may" in found["error"]["message"]
        busy.go.set()
        assert np.abs(rows(running.result()) - classifier.embed_texts(list("abcd"))).max() < 1e-3
        assert np.abs(rows(busy.embed("e")) - classifier.embed_texts(["e"])).max() < 1e-3


def test_known_texts_are_answered_while_the_queue_is_full(held, pool):
    with held(max_queue=1) as busy:
        busy.go.set()
        known = rows(busy.embed("known"))
        busy.go.clear()
        pool.submit(busy.embed, "new")
        wait_until(lambda: ["new"] in busy.batches)
        assert busy.embed("newer")[0] == 429
        assert np.array_equal(rows(busy.embed("known")), known)


def test_a_client_that_leaves_frees_what_waits(held, pool):
    with held() as busy:
        running = pool.submit(busy.embed, "first")
        wait_until(lambda: busy.batches)
        leaving = busy.server.send(request("/v1/embeddings", {"input": ["left", "behind"]}))
        wait_until(lambda: busy.served.texts.held == 3)
        leaving.close()
        wait_until(lambda: busy.served.texts.held == 1)
        busy.go.set()
        assert running.result()[0] == 200
        assert busy.embed("last")[0] == 200
        assert busy.batches == [["first"], ["last"]]
        assert busy.server.metric('clip_requests_total{route="/v1/embeddings",status="499"}') == 1


def test_a_client_that_leaves_within_its_body_leaves_nothing_behind(held):
    with held() as busy:
        content = request("/v1/embeddings", {"input": ["left", "behind"]})
        with busy.server.send(content[:-5]):
            wait_until(lambda: busy.api.held)
        wait_until(lambda: busy.server.metric('clip_requests_total{route="/v1/embeddings",status="499"}') == 1)
        assert busy.api.held == 0
        assert not busy.batches


def test_an_answer_that_takes_too_long_is_given_up(held, pool):
    with held(timeout_s=1) as busy:
        status, headers, found = busy.server.ask(
            "POST", "/v1/embeddings", b'{"input": "slow"}', {"content-type": "application/json"}
        )
        assert (status, headers["retry-after"], found["error"]["type"]) == (503, "1", "server_error")
        wait_until(lambda: busy.served.texts.held == 0)


def test_a_body_that_does_not_come_is_given_up(held):
    with held(timeout_s=1) as busy:
        with busy.server.send(request("/v1/embeddings", {"input": "a"})[:-3]) as slow:
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        assert not busy.batches


@pytest.mark.parametrize("sent", [b"POST /v1/embeddings HTTP/1.1\r\nHo", b"P"])
def test_headers_that_do_not_come_are_given_up(held, monkeypatch, sent):
    monkeypatch.setattr(protocol, "HEADERS_S", 0.3)
    with held() as busy, busy.server.send(sent) as slow:
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


def test_headers_that_trickle_are_given_up_and_a_silent_connection_is_closed(held, monkeypatch):
    monkeypatch.setattr(protocol, "HEADERS_S", 0.5)
    with held() as busy:
        with busy.server.send(b"GET /health/live HTTP/1.1\r\n") as slow:
            slow.settimeout(0.05)
            for _ in range(100):
                slow.sendall(b"A: b\r\n")
                with suppress(TimeoutError):
                    answer = slow.recv(100)
                    break
            assert answer.startswith(b"HTTP/1.1 408 ")
        with busy.server.send(b"") as silent:
            assert silent.recv(100) == b""


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000, b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"]
)
def test_large_headers_are_refused(held, sent):
    with held() as busy, busy.server.send(sent) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 431 ")


def test_what_is_no_http_is_refused(held):
    with held() as busy, busy.server.send(b"\x16\x03\x01 hello\r\n\r\n") as connection:
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"this is not an HTTP/1.1 request" in answer
        assert busy.server.metric('clip_requests_total{route="other",status="400"}') == 1


def test_answers_that_nobody_reads_are_given_up(held, monkeypatch):
    monkeypatch.setattr(protocol, "UNREAD_S", 0.2)
    with held() as busy, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((busy.server.host, int(busy.server.port)))
        with pytest.raises(ConnectionError):  # noqa: PT012
            for _ in range(10_000):
                deaf.sendall(b"GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n")
                time.sleep(0.001)


def test_many_requests_before_the_first_answer_end_a_connection(held):
    with held() as busy, busy.server.send(GET * 10) as few:
        wait_until(lambda: few.recv(65_536, socket.MSG_PEEK).count(b"HTTP/1.1 200 ") == 10)
        answers = b""
        with busy.server.send(GET * 100) as many, suppress(ConnectionError):
            while part := many.recv(65_536):
                answers += part
        assert answers.count(b"HTTP/1.1 200 ") < 100


def test_too_many_connections_are_told(held, monkeypatch):
    with held() as busy:
        monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 1)
        with busy.server.send(b"GET"), busy.server.send(b"") as second:
            answer = second.recv(1000)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in answer
        monkeypatch.undo()
        wait_until(busy.server.is_ready)
        assert busy.server.metric('clip_requests_total{route="other",status="503"}') == 1


def test_who_asks_for_another_protocol_is_answered_in_this_one(held, monkeypatch):
    """Without uvicorn's advice to install WebSockets."""
    said = []
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "warning", said.append)
    with held() as busy:
        asked = {"connection": "Upgrade", "upgrade": "websocket"}
        assert busy.server.ask("GET", "/health/live", headers=asked)[0] == 200
    assert said == []


def test_many_large_bodies_at_once_are_told(held, monkeypatch):
    monkeypatch.setattr(web_app, "BODIES", 1)
    with held(max_body_mb=1) as busy:
        content = request("/v1/embeddings", b" " * 900_000)
        with busy.server.send(content[:-1]) as first:
            wait_until(lambda: busy.api.held == 899_999)
            assert busy.server.post("/v1/embeddings", b" " * 900_000)[0] == 429
            first.sendall(content[-1:])
            assert first.recv(100).startswith(b"HTTP/1.1 400 ")
        assert busy.server.post("/v1/embeddings", b" " * 900_000)[0] == 400


def test_what_is_no_finite_vector_is_never_an_answer(held, classifier):
    with held() as busy:
        busy.go.set()
        encode = busy.served.pictures.encode

        def broken(images):
            found = np.stack(encode(images))
            found[[image.mean() > 0 for image in images]] = np.nan
            return list(found)

        busy.served.pictures.encode = broken
        white, black = ({"image": encoded(Image.new("RGB", (60, 60), colour))} for colour in ("white", "black"))
        status, found = busy.server.post("/v1/embeddings", {"input": [white]})
        assert (status, found["error"]["type"]) == (500, "server_error")
        assert found["error"]["message"] == "the server failed, and its log says why"
        good = rows(busy.server.post("/v1/embeddings", {"input": [black]}))
        assert np.abs(good - classifier.embed_images([Image.new("RGB", (60, 60))])).max() < 1e-3


def test_a_connection_is_kept_for_the_next_request(held):
    with held() as busy:
        busy.go.set()
        connection = HTTPConnection(busy.server.host, int(busy.server.port))
        used = set()
        for body, expected in ((b'{"input": "a"}', 200), (b"{}", 400), (b'{"input": "a"}', 200)):
            connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == expected
            used.add(connection.sock.getsockname())
        assert len(used) == 1
        connection.close()
