"""The server's processes: one, or several that accept from one socket."""

import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing import connection
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import own_folder
from clip_deploy.core.subprocesses import die_with_parent, ending
from clip_deploy.web.hosts import NamedHosts, check_hosts, is_local
from clip_deploy.web.keys import Keys, warn_if_readable
from clip_deploy.web.settings import Settings

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from multiprocessing.sharedctypes import SynchronizedString

    from clip_deploy.web.app import App

METRICS = "clip-deploy-metrics-"  # a folder of the workers' numbers, in the temporary folder
KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that they hang up first
FAILED = 3  # exit code of a worker that cannot begin
RESTART_S = 1  # before a worker is replaced: one may die each time that it begins
IDENTITY = 64  # letters of an Api's identity


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C, and return the exit code.

    Raises DeployError where the address is taken or a host's name is none, or as create_app does; KeyboardInterrupt
    after Ctrl-C.
    """
    check_hosts("--allow-host", settings.allow_hosts)
    check_hosts("--allow-image-host", settings.image_hosts)
    _warn(settings)
    listening = _bind(settings)
    if settings.workers > 1:
        return _serve_many(settings, listening)
    from clip_deploy.web.app import create_app

    app, address = create_app(settings), _address(listening)
    if _run(settings, app, listening, lambda served: _announce(served, settings, address)):
        raise KeyboardInterrupt
    return 0


def uvicorn_config(settings: Settings, app: "App") -> uvicorn.Config:
    """How uvicorn runs an application: bounded requests, and without access log, proxy headers and WebSockets."""
    from clip_deploy.web.protocol import BoundedProtocol

    return uvicorn.Config(
        NamedHosts(app, settings.allow_hosts, app.observe) if is_local(settings.host) else app,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.timeout_s),
    )


class Announced(uvicorn.Server):
    """A server that says when it answers.

    Attributes:
        is_interrupted: whether Ctrl-C was given. uvicorn raises it again once it stopped, in a loop that may be over.
    """

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self.announce, self.is_interrupted = announce, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.is_interrupted = self.is_interrupted or sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.announce()


def _run(settings: Settings, app: "App", listening: socket.socket, announce: Callable[[str], None]) -> bool:
    """Serve until a signal, and return whether it was Ctrl-C; `announce` is given what is served, once it answers."""
    server = Announced(uvicorn_config(settings, app), lambda: announce(_served(app)))
    # Before it runs, and after: uvicorn raises the signal again once it stopped, for a code of 143.
    signal.signal(signal.SIGTERM, server.handle_exit)
    server.run([listening])
    return server.is_interrupted


def _announce(served: str, settings: Settings, address: str) -> None:
    workers = f" with {settings.workers} workers" if settings.workers > 1 else ""
    print(f"serving {served}{workers} at {address}", flush=True)


def _serve_many(settings: Settings, listening: socket.socket) -> int:
    """As serve, by several workers."""
    keys = Keys(settings.api_key_file)
    with own_folder(METRICS) as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        return Parent(settings, keys, listening).run()


class Parent:
    """Has workers, replaces one that dies, and takes them along when it ends.

    All answer alike, those that begin later too: by the same keys, and from the packages and the index that the first
    one opened.

    Attributes:
        told: what a worker serves, or None once they are to stop.
        is_announced: whether a worker has answered.
    """

    def __init__(self, settings: Settings, keys: Keys, listening: socket.socket) -> None:
        self.settings, self.listening = settings, listening
        self.told, self.tell = multiprocessing.Pipe(duplex=False)
        spawn = multiprocessing.get_context("spawn")
        given = (settings, keys, listening, self.tell, spawn.Array("c", IDENTITY))
        self.create = partial(spawn.Process, target=_work, args=given)
        self.workers = [self.create() for _ in range(settings.workers)]
        self.is_announced = self.is_stopping = self.is_interrupted = self.has_failed = False

    def run(self) -> int:
        """Until the last worker has ended. Return the exit code; raise KeyboardInterrupt after Ctrl-C."""
        address = _address(self.listening)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        for worker in self.workers:
            _start(worker)
        if self.is_stopping:  # the signal came before all of them were there
            self.end()
        while self.workers:
            ended = connection.wait([self.told, *(worker.sentinel for worker in self.workers)])
            if self.told in ended:
                served = self.told.recv()
                if served is None:  # else what comes after the workers stopped to accept is reset, and not refused
                    self.listening.close()
                elif not self.is_announced:
                    self.is_announced = True
                    _announce(served, self.settings, address)
            for worker in [worker for worker in self.workers if worker.sentinel in ended]:
                worker.join()
                self.workers.remove(worker)
                self._lost(worker.exitcode or 0)
        if self.is_interrupted and not self.has_failed:
            raise KeyboardInterrupt
        return 1 if self.has_failed else 0

    def stop(self, number: int, frame: FrameType | None) -> None:
        """At a signal. The second one hurries those that drain."""
        is_hurried, self.is_interrupted = self.is_stopping, self.is_interrupted or number == signal.SIGINT
        self.end()
        for worker in self.workers if is_hurried else ():
            if worker.pid and worker.is_alive():
                os.kill(worker.pid, signal.SIGINT)

    def end(self) -> None:
        """Have all workers drain and end."""
        self.is_stopping = True
        self.tell.send(None)
        for worker in self.workers:
            if worker.is_alive():
                worker.terminate()

    def _lost(self, code: int) -> None:
        """A worker ended with this code: begin another, or end where the next would end so too."""
        if self.is_stopping:
            self.has_failed = self.has_failed or code == FAILED
        elif code == FAILED or not self.is_announced:
            if code != FAILED:  # it has said nothing itself
                print(f"error: a worker {ending(code)} before it answered{_hint(code)}", file=sys.stderr)
            self.has_failed = True
            self.end()
        else:
            print(f"warning: a worker {ending(code)}{_hint(code)}, and another begins", file=sys.stderr)
            time.sleep(RESTART_S)
            self.workers.append(self.create())
            _start(self.workers[-1])
            if self.is_stopping:  # the signal came before it was there
                self.workers[-1].terminate()


def _start(worker: "BaseProcess") -> None:
    """Ctrl-C, which a terminal sends to the workers too, is the parent's to handle: they begin without it."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        worker.start()
    finally:
        signal.signal(signal.SIGINT, handler)


def _hint(code: int) -> str:
    """A worker's files of numbers are mapped into memory: without room for them, the system ends it so."""
    return f" ({tempfile.gettempdir()} may be full: TMPDIR names another folder)" if code == -signal.SIGBUS else ""


def _work(
    settings: Settings,
    keys: Keys,
    listening: socket.socket,
    tell: "connection.Connection[str | None, str | None]",
    first: "SynchronizedString",
) -> None:
    """A worker. One whose package does not open would not open it the next time either.

    `first` holds the identity of what the first worker opened, and is empty before that.
    """
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it ended before that
        return
    from clip_deploy.web.app import create_app

    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        app = create_app(settings, keys)
        _check_identity(app.state.api.identity(), first)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(FAILED)
    _run(settings, app, listening, tell.send)


def _check_identity(own: str, first: "SynchronizedString") -> None:
    """Raise DeployError where a worker opened other than the first one: one port would give two models' answers."""
    with first.get_lock():
        first.value = first.value or own.encode()
    if first.value != own.encode():
        raise DeployError(
            "a package or the index has changed since the server started, and a new worker would answer otherwise than "
            "the others: start the server again"
        )


def _bind(settings: Settings) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.set_inheritable(True)
    except (OSError, UnicodeError) as error:  # of a name with an empty or too long part it is UnicodeError
        said = error.strerror if isinstance(error, OSError) else error
        raise DeployError(
            f"cannot listen at {settings.host} port {settings.port} ({said}): give another --host or --port"
        ) from error
    return listening


def _warn(settings: Settings) -> None:
    if settings.api_key_file:
        warn_if_readable(settings.api_key_file)
    elif not is_local(settings.host):
        warnings.warn(
            f"--host {settings.host} lets everyone who reaches this machine use the server without a key: give "
            "--api-key-file, or put a proxy in front",
            stacklevel=2,
        )


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _served(app: "App") -> str:
    """The packages, and the index."""
    api = app.state.api
    names = ", ".join(f"{served.id} ({served.classifier.package.summary()})" for served in api.models.served)
    return f"{names}, and a search of {api.searched.rows:,} images," if api.searched else names
