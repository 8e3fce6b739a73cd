"""Start a real Triton server on free ports of 127.0.0.1, wait until it is ready, and always end it.

The server is the one inside the Python package nvidia-pytriton: the official binary with the python backend, HTTP, gRPC
and metrics, without the other backends. It lives in an environment of its own, which `make triton-env` makes.
"""

import filecmp
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.core.subprocesses import die_with_parent
from clip_deploy.serving.repository import FLAGS

START_S = 120.0  # until the server is ready; a server without a load answers after 2
READY = "/v2/models/clip_zero_shot/ready"  # the ensemble is, once all that it calls are
PACKAGES = ("nvidia_pytriton", "numpy", "tokenizers", "pillow", "tritonclient")
RUNTIMES = ("onnxruntime", "openvino", "torch")  # of packages; what is installed of them is in the record too
LIBDIR = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"
SHARED = Path("/dev/shm")
PREFIX = "clip_deploy_"
GUARD = """
import os, signal, sys
from pathlib import Path
group = sys.stdin.readline()
sys.stdin.read()  # ends when the process that started this one lets go, or is killed
try:
    os.killpg(int(group), signal.SIGKILL)
except (ProcessLookupError, ValueError):
    pass
for region in Path(sys.argv[1]).glob(sys.argv[2] + "*"):
    region.unlink(missing_ok=True)
"""


@dataclass
class Environment:
    """Where a server and its Python are.

    Attributes:
        python: the environment's interpreter, in which the python backend's models run too.
        packages: its site-packages.
    """

    python: Path
    packages: Path

    @property
    def triton(self) -> Path:
        return self.packages / "pytriton" / "tritonserver"

    @property
    def stub(self) -> Path:
        """What starts a model of the python backend, in the build for this version of Python."""
        return self.triton / "python_backend_stubs" / self.ask(VERSION) / "triton_python_backend_stub"

    def variables(self) -> dict[str, str]:
        """The library of the environment's own Python comes first: the server embeds it.

        No bytecode is written: it would lie in a version's folder, which then counts as changed and is loaded again
        whenever its model is looked at.
        """
        libraries = [self.ask(LIBDIR), str(self.packages / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH")]
        return {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "PATH": str(self.python.parent) + os.pathsep + os.environ["PATH"],
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def ask(self, code: str) -> str:
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@dataclass
class Server:
    """A running server: its ports, its process, where it logs, and who clears up behind it."""

    http: int
    grpc: int
    metrics: int
    process: subprocess.Popen[bytes]
    log: Path
    guard: subprocess.Popen[bytes]

    def is_ready(self) -> bool:
        return answers(self.http, READY)

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return next((line for line in reversed(lines) if line.startswith(("E", "error"))), lines[-1] if lines else "")


def versions(environment: Path) -> dict[str, str]:
    """Versions of the packages that decide how the server answers, as installed; empty without an environment."""
    return {name: version for name, version in installed(environment).items() if name in (*PACKAGES, *RUNTIMES)}


def installed(environment: Path) -> dict[str, str]:
    """The version of every package, by its name in lower case and with underscores."""
    paths = environment.glob("lib/python3*/site-packages/*.dist-info")
    parts = [path.name.removesuffix(".dist-info").partition("-") for path in paths]
    return dict(sorted((name.lower(), version) for name, _, version in parts))


def check_runtimes(environment: Path, requires: Sequence[str]) -> None:
    """Raises UnavailableError where a package's runtime is not in the server's environment."""
    here = installed(environment)
    missing = [line for line in requires if line.partition("==")[0].lower().replace("-", "_") not in here]
    if missing:
        lines = " ".join(missing)
        raise UnavailableError(
            f"the package runs with {lines}, which {environment} lacks: "
            f"`{environment}/bin/pip install --no-deps {lines}` adds it"
        )


def find_environment(folder: Path) -> Environment:
    """Raises UnavailableError where there is no server, or one whose numpy makes it answer with nothing."""
    found = versions(folder)
    missing = [name for name in PACKAGES if name not in found]
    if missing:
        raise UnavailableError(f"no Triton server: {folder} lacks {', '.join(missing)}; run `make triton-env`")
    if int(found["numpy"].split(".")[0]) >= 2:
        raise UnavailableError(
            f"{folder} has numpy {found['numpy']}, with which this server answers with empty outputs: numpy < 2 is "
            "needed; run `make triton-env`"
        )
    (packages,) = folder.glob("lib/python3*/site-packages")
    environment = Environment(folder.absolute() / "bin" / "python", packages.absolute())
    if not environment.stub.exists():
        raise UnavailableError(f"this Triton has no models' runner for Python {environment.stub.parent.name}")
    return environment


@contextmanager
def serve(repository: Path, environment: Environment, log: Path) -> Iterator[Server]:
    """A server over `repository` that is ready, with models loaded and unloaded by request only.

    Raises DeployError with the server's last line where it ends or is not ready in time.
    """
    server = _start(repository, environment, log)
    try:
        _wait(server)
        yield server
    finally:
        stop(server)


def _start(repository: Path, environment: Environment, log: Path) -> Server:
    _place_stub(environment)
    ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
    sweep()
    guard = start_guard(_region(ports["http"]))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(repository, environment, ports),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment.variables(),
            preexec_fn=die_with_parent,
            start_new_session=True,
        )
    watch(guard, process)
    return Server(**ports, process=process, log=log, guard=guard)


def command(repository: Path, environment: Environment, ports: dict[str, int]) -> list[str]:
    """The command line of a server on this machine alone. `ports` is by protocol: http, grpc, metrics."""
    given = [
        str(environment.triton / "bin" / "tritonserver"),
        f"--model-repository={repository.absolute()}",
        f"--backend-directory={environment.triton / 'backends'}",
        f"--backend-config=python,shm-region-prefix-name={_region(ports['http'])}",
        "--allow-gpu-metrics=false",
        "--disable-auto-complete-config",  # they are whole; else each model is started twice, first to be asked
        *FLAGS,
    ]
    for name, port in ports.items():
        given += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    return given


def start_guard(region: str) -> subprocess.Popen[bytes]:
    """A process that ends a server's models and frees their memory once its input ends: a killed server leaves both."""
    command = [sys.executable, "-c", GUARD, str(SHARED), region]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def watch(guard: subprocess.Popen[bytes], server: subprocess.Popen[bytes]) -> None:
    """Let `guard` kill the server, and all that it started, as soon as this process ends."""
    assert guard.stdin is not None  # it is piped
    guard.stdin.write(f"{server.pid}\n".encode())
    guard.stdin.flush()


def sweep() -> None:
    """Free what a run left behind that was killed with its guard."""
    for region in SHARED.glob(f"{PREFIX}*"):
        owner = region.name.removeprefix(PREFIX).partition("_")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            region.unlink(missing_ok=True)


def _place_stub(environment: Environment) -> None:
    """The python backend starts each model by a program that was built for one version of Python."""
    stub, placed = environment.stub, environment.triton / "backends" / "python" / environment.stub.name
    if not placed.exists() or not filecmp.cmp(stub, placed, shallow=False):  # it may be running for another server
        shutil.copy2(stub, placed)


def _wait(server: Server) -> None:
    end = time.monotonic() + START_S
    while not server.is_ready():
        if server.process.poll() is not None:
            raise DeployError(f"Triton ended with code {server.process.returncode}: {server.last_line()}")
        if time.monotonic() > end:
            raise DeployError(f"Triton was not ready after {START_S:.0f} s: {server.last_line()}")
        time.sleep(0.1)


def stop(server: Server) -> None:
    """SIGKILL by the guard, to its models' processes too: it has nothing to save, and takes 4 s to end by SIGTERM."""
    server.guard.communicate()
    server.process.wait()


def _region(port: int) -> str:
    """Shared memory by which the server and its models' processes speak, named apart from another server's."""
    return f"{PREFIX}{os.getpid()}_{port}_"


def model_config(server: Server, model: str) -> dict[str, Any]:
    """A model's configuration as the server completed it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http}/v2/models/{model}/config", timeout=5) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def load_model(server: Server, model: str, config: dict[str, Any]) -> None:
    """Load a model again by `config`, which holds until the server ends."""
    body = {"parameters": {"config": json.dumps(config)}}
    address = f"http://127.0.0.1:{server.http}/v2/repository/models/{model}/load"
    request = urllib.request.Request(address, data=json.dumps(body).encode(), method="POST")
    try:
        urllib.request.urlopen(request, timeout=START_S).close()
    except urllib.error.HTTPError as error:
        raise DeployError(f"Triton does not load {model}: {error.read().decode(errors='replace')[:200]}") from error


def answers(port: int, path: str) -> bool:
    """Whether a path of the server answers with 200 within 5 s."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            found: bool = answer.status == 200
            return found
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
