"""The server's processes: one, or several that accept from one socket."""

import logging
import os
import signal
import socket
import sys
import tempfile
import warnings
from functools import partial
from ipaddress import ip_address

import uvicorn
from starlette.applications import Starlette
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from clip_deploy.core.errors import DeployError
from clip_deploy.web.keys import warn_if_readable
from clip_deploy.web.settings import Settings

KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that they hang up first
HUNG_S = 60  # a worker that answers nothing so long is replaced


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C, and return the exit code.

    Raises DeployError where the address is taken, or as create_app does.
    """
    _warn(settings)
    listening = _bind(settings)
    if settings.workers > 1:
        return _serve_many(settings, listening)
    from clip_deploy.web.app import create_app

    app = create_app(settings)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after it stopped, for a code of 143
    print(f"serving {_names(app)} at {_address(listening)}", flush=True)
    uvicorn.Server(uvicorn_config(settings, app)).run([listening])
    return 0


def uvicorn_config(settings: Settings, app: object) -> uvicorn.Config:
    from clip_deploy.web.protocol import BoundedProtocol

    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        workers=settings.workers,
        factory=not isinstance(app, Starlette),
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.timeout_s),
        timeout_worker_healthcheck=HUNG_S,
    )


def _serve_many(settings: Settings, listening: socket.socket) -> int:
    """Workers that a parent starts, and replaces where one dies."""
    with tempfile.TemporaryDirectory(prefix="clip-deploy-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        print(f"serving with {settings.workers} workers at {_address(listening)}", flush=True)
        supervisor = Multiprocess(uvicorn_config(settings, partial(_worker_app, settings)), [listening])
        supervisor.run()
        failed = any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes)
        return 1 if failed else 0


def _worker_app(settings: Settings) -> Starlette:
    """In a worker: a package that does not open would not open the next time either."""
    from clip_deploy.web.app import create_app

    try:
        return create_app(settings)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(STARTUP_FAILURE)


def _bind(settings: Settings) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.set_inheritable(True)
    except OSError as error:
        raise DeployError(
            f"cannot listen at {settings.host} port {settings.port} ({error.strerror}): give another --host or --port"
        ) from error
    return listening


def _warn(settings: Settings) -> None:
    if settings.api_key_file:
        warn_if_readable(settings.api_key_file)
    elif not _is_local(settings.host):
        warnings.warn(
            f"--host {settings.host} lets everyone who reaches this machine ask without a key: give --api-key-file, or "
            "a proxy in front",
            stacklevel=2,
        )


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _names(app: Starlette) -> str:
    return ", ".join(f"{served.id} ({served.classifier.package.summary()})" for served in app.state.api.models.served)
