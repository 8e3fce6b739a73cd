"""Load on a running server, by NVIDIA's perf_analyzer: latency and throughput at each number of clients."""

import base64
import csv
import json
import re
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_deploy.core.config import TritonCheckConfig
from clip_deploy.core.errors import DeployError
from clip_deploy.core.served import Load
from clip_deploy.serving.server import Environment, Server

WINDOWS = 3  # measured at one number of clients; perf_analyzer means over them
ACCEPTED_PERCENT = (
    1000  # between windows: it would throw away what a busy machine spreads wider, and we state the spread
)
LIMIT_S = 90.0  # of one run beyond its windows
BEYOND = 5  # calls that must lie beyond a percentile that is stated
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}  # it wants them by these names
PASS = re.compile(r"Pass \[\d+\] throughput: ([\d.]+) infer/sec")
COLUMNS = {"p50_ms": "p50 latency", "p90_ms": "p90 latency", "p99_ms": "p99 latency", "queue_ms": "Server Queue"}


@dataclass
class Work:
    """What is asked of one model again and again.

    Attributes:
        requests: one array a name; strings are bytes of dtype object. Shapes are without the batch axis where the
            model has one.
        note: what the report says of it.
    """

    model: str
    protocol: str  # "http" or "grpc"
    requests: list[dict[str, np.ndarray]]
    note: str = ""


def measure_load(server: Server, environment: Environment, work: Work, settings: TritonCheckConfig) -> list[Load]:
    """A row for each number of clients."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data.json").write_text(json.dumps({"data": [encoded(request) for request in work.requests]}))
        with libraries(environment, folder) as variables:
            return [_measure(server, environment, work, settings, folder, variables, n) for n in settings.concurrency]


def _measure(
    server: Server,
    environment: Environment,
    work: Work,
    settings: TritonCheckConfig,
    folder: Path,
    variables: dict[str, str],
    clients: int,
) -> Load:
    port = server.http if work.protocol == "http" else server.grpc
    command = [str(environment.python.with_name("perf_analyzer")), "-m", work.model, "-u", f"127.0.0.1:{port}"]
    command += ["-i", work.protocol, "--concurrency-range", str(clients), "--input-data", str(folder / "data.json")]
    command += ["--measurement-interval", str(round(settings.seconds * 1000)), "--max-trials", str(WINDOWS)]
    command += ["--stability-percentage", str(ACCEPTED_PERCENT), "-v", "-f", str(folder / "latency.csv")]
    before = counters(server, work.model)
    timeout_s = LIMIT_S + WINDOWS * settings.seconds
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout_s, check=False)
    after = counters(server, work.model)
    try:
        (row,) = csv.DictReader((folder / "latency.csv").read_text().splitlines())
    except (OSError, ValueError) as error:
        raise DeployError(f"perf_analyzer measured nothing of {work.model}: {_last(done)}") from error
    finally:
        (folder / "latency.csv").unlink(missing_ok=True)
    return Load(
        model=work.model,
        protocol=work.protocol,
        note=work.note,
        clients=clients,
        **summary(row, *(after[name] - before[name] for name in ("success", "count", "executions"))),
        windows_per_s=[float(rate) for rate in PASS.findall(done.stdout)][-WINDOWS:],
    )


def summary(row: dict[str, str], requests: float, rows: float, executions: float) -> dict[str, float]:
    """Milliseconds of perf_analyzer's microseconds, and what the server counted meanwhile."""
    columns = {
        name: float(row[column]) / 1000
        for name, column in COLUMNS.items()
        if column in row and requests * (1 - _quantile(name)) >= BEYOND
    }
    mean_batch = {"mean_batch": rows / executions} if executions else {}
    return {"requests_per_s": float(row["Inferences/Second"]), **columns, **mean_batch}


def _quantile(name: str) -> float:
    found = re.match(r"p(\d+)_", name)
    return int(found[1]) / 100 if found else 0.0


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def encoded(request: dict[str, np.ndarray]) -> dict[str, Any]:
    """A request as perf_analyzer's JSON has it: by input, its bytes in base64 and its shape."""
    return {
        name: {"content": {"b64": base64.b64encode(raw(array)).decode()}, "shape": list(array.shape)}
        for name, array in request.items()
    }


def raw(array: np.ndarray) -> bytes:
    """As in a request: each string behind its length."""
    if array.dtype != object:
        return np.ascontiguousarray(array).tobytes()
    return b"".join(len(item).to_bytes(4, "little") + item for item in array.reshape(-1))


@contextmanager
def libraries(environment: Environment, folder: Path) -> Iterator[dict[str, str]]:
    """Variables with which perf_analyzer finds its libraries among those of the server's package."""
    links = folder / "libraries"
    links.mkdir()
    own = environment.packages / "nvidia_pytriton.libs"
    for name, pattern in LIBRARIES.items():
        (links / name).symlink_to(next(own.glob(pattern)))
    variables = environment.variables()
    yield variables | {"LD_LIBRARY_PATH": f"{links}:{own}:{variables['LD_LIBRARY_PATH']}"}


COUNTERS = {
    "success": "nv_inference_request_success",
    "count": "nv_inference_count",
    "executions": "nv_inference_exec_count",
}


def counters(server: Server, model: str) -> dict[str, float]:
    """What the server's own metrics count for a model, over all its versions."""
    found = read_metrics(server)
    label = f'model="{model}"'
    return {
        short: sum(value for key, value in found if key.startswith(name + "{") and label in key)
        for short, name in COUNTERS.items()
    }


def read_metrics(server: Server) -> list[tuple[str, float]]:
    """Every sample that /metrics exposes, by its name with labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples = [line.rpartition(" ") for line in lines if line and not line.startswith("#")]
    return [(key, float(value)) for key, _, value in samples]
