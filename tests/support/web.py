"""A server of `clip-deploy serve` as tests start and ask it: a process of its own, over a real socket."""

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from io import BytesIO

import numpy as np
import uvicorn
from support.project import ROOT

from clip_deploy.web.server import uvicorn_config

STARTS_S = 60


BROKEN = (OSError, HTTPException)  # a server that ends refuses, or leaves an answer half-way


class Server:
    """Attributes: host, port, url, process; said: the line with which it began."""

    def __init__(self, process, url):
        self.process, self.url = process, url
        self.host, self.port = re.fullmatch(r"http://(.*):(\d+)", url).groups()

    def ask(self, method, path, body=None, headers=None, timeout=30):
        """Status, headers and what JSON said, or the text where it is none."""
        status, found, content = self.fetch(method, path, body, headers, timeout)
        is_json = found.get("content-type", "").startswith("application/json")
        return status, found, json.loads(content) if is_json else content.decode()

    def fetch(self, method, path, body=None, headers=None, timeout=30):
        """Status, headers and bytes."""
        connection = HTTPConnection(self.host, int(self.port), timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def is_ready(self):
        try:
            return self.get("/health/ready")[0] == 200
        except BROKEN:
            return False

    def get(self, path, **headers):
        return self.ask("GET", path, headers=headers)

    def post(self, path, body, **headers):
        """Status and body of the answer to a JSON body, or to bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, found = self.ask("POST", path, content, {"content-type": "application/json", **headers})
        return status, found

    def embed(self, **body):
        """Embeddings [items, dimension], or AssertionError."""
        status, found = self.post("/v1/embeddings", body)
        assert status == 200, found
        assert [item["index"] for item in found["data"]] == list(range(len(found["data"])))
        return vectors([item["embedding"] for item in found["data"]])

    def metric(self, line):
        """The number that stands behind a name and its labels in /metrics; 0 where it does not."""
        found = re.search(rf"^{re.escape(line)} (\S+)$", self.get("/metrics")[2], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stop(self):
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def send(self, content):
        """A connection over which these bytes went."""
        connection = socket.create_connection((self.host, int(self.port)), timeout=30)
        connection.sendall(content)
        return connection


def request(path, body, **headers):
    """A POST as bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": len(content), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


def vectors(embeddings):
    """Of an answer, as floats or as base64."""
    if isinstance(embeddings[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in embeddings])
    return np.array(embeddings, dtype=np.float32)


@contextmanager
def serving(*arguments, drain_s="0"):
    """A server at a free port that is ready; it is stopped, and must end well."""
    command = [sys.executable, "-m", "clip_deploy", "serve", "--port", "0", "--drain-s", drain_s]
    process = subprocess.Popen(
        [*command, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, process.stderr.read()
        server = Server(process, found[0])
        server.said = line
        wait_until(server.is_ready)
        yield server
        if process.poll() is None:
            assert server.stop() == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@contextmanager
def served_here(app, settings):
    """The same in a thread of this process, for tests that change what is within."""
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn_config(settings, app))
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    server = Server(None, f"http://127.0.0.1:{listening.getsockname()[1]}")
    try:
        wait_until(server.is_ready)
        yield server
    finally:
        running.should_exit = True
        thread.join()


def wait_until(holds, seconds=STARTS_S):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def encoded(image, kind="JPEG", **options):
    """An image of Pillow as base64 of a file."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()
