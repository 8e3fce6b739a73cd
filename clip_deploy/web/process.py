"""A server in a process of its own, as `clip-deploy serve` starts it: for checks, which hold it against its package."""

import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from clip_deploy.core.errors import DeployError
from clip_deploy.core.subprocesses import die_with_parent, ending

ROOT = Path(__file__).resolve().parents[2]  # the server's program is imported from here
PROGRAM = ("-m", "clip_deploy")
FIXED = ("--port", "0", "--drain-s", "0")
START_S = 120.0  # until it says its address
STOP_S = 40.0  # from SIGTERM until SIGKILL


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, its process, and the file with what it says."""

    host: str
    port: int
    process: subprocess.Popen[str]
    log: Path

    def memory_mb(self) -> float | None:
        """Resident memory of the process and its workers; None where /proc does not tell it, as outside Linux."""
        try:
            return sum(map(_resident_kb, [self.process.pid, *_children(self.process.pid)])) / 1e3
        except OSError:
            return None

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


@contextmanager
def running(package: Path, *options: str, program: Sequence[str] | None = None) -> Iterator[Server]:
    """A server of `package` at a free port of 127.0.0.1, with further options of `clip-deploy serve`.

    Raises DeployError with the server's last line where it does not start.
    """
    command = [sys.executable, *(program or PROGRAM), "serve", str(package.absolute()), *FIXED, *options]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("w") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True, preexec_fn=die_with_parent
            )
        try:
            server = Server(*_address(process, log), process, log)
            _wait(server)
            yield server
        finally:
            _stop(process)


def _address(process: subprocess.Popen[str], log: Path) -> tuple[str, int]:
    assert process.stdout is not None  # it is piped
    end, line = time.monotonic() + START_S, ""
    if select.select([process.stdout], [], [], START_S)[0]:
        line = process.stdout.readline()
    found = re.search(r"http://(\S+):(\d+)$", line.strip())
    if found:
        return found[1], int(found[2])
    left = max(0.0, end - time.monotonic()) if not line else 0.0
    if not left:
        process.kill()
    code = process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    raise DeployError(f"the server {ending(code)} before it said its address: {lines[-1] if lines else line.strip()}")


def _wait(server: Server) -> None:
    """It says its address before it accepts."""
    end = time.monotonic() + START_S
    while not _is_ready(server):
        if server.process.poll() is not None or time.monotonic() > end:
            raise DeployError(f"the server is not ready: {server.last_line()}")
        time.sleep(0.02)


def _is_ready(server: Server) -> bool:
    connection = HTTPConnection(server.host, server.port, timeout=START_S)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _resident_kb(process: int) -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
