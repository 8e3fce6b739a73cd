"""Throughput and latency of `clip-deploy serve`: python -m benchmarks.serve (or `make bench-serve`)

    python -m benchmarks.serve artifacts=FOLDER clients=1,8,32 seconds=8 output=FILE      # of a slow model

With artifacts/package as the last `dvc repro` made it, and, where `make triton-env` made its environment, beside
Triton's python backend over artifacts/triton. One client program asks both servers over HTTP for one image a request,
in turns, from 1 to 64 connections. Images are JPEG files of the model's own size. `embeddings` and `zero-shot` are
ours; `Triton zero-shot` is asked for the same files and labels, `Triton pixels` is its bare tower, with pixel values
that the client prepared beforehand. The tower alone encodes batches of 32, and one image after the other, while no
server is asked: it has all cores then, and the servers share them with the client. Each number of clients asks for
`seconds` (1.5) in each round. Prints a line each and writes reports/serve.json, or `output`.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from clip_deploy.core.environment import cores, hardware
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.core.files import write_text
from clip_deploy.core.images import decode
from clip_deploy.core.package import read_package
from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.serving.load_test import raw
from clip_deploy.serving.server import find_environment
from clip_deploy.serving.server import serve as serve_triton
from clip_deploy.web.connection import Connection
from clip_deploy.web.load_test import loop_factory
from clip_deploy.web.process import running
from clip_deploy.web.questions import EMBEDDINGS, ZERO_SHOT, encoded, post, saved

CLIENTS = "1,2,4,8,16,32,64"  # 1 and 32 are what the goals are of
SECONDS = "1.5"  # of one number of clients in one round
ROUNDS = 5  # the interval from the lowest to the highest holds the true median with 94 %
IMAGES = 64
LABELS = ["a red circle", "a blue square", "a green star", "a yellow cross"]
BATCH = 32  # of the tower alone
DATATYPES = {"object": "BYTES", "float32": "FP32", "int64": "INT64", "uint8": "UINT8"}  # KServe's, of numpy's

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "reports" / "serve.json"


@dataclass(frozen=True)
class Contestant:
    """What is asked, and of whom; `process` is the server's, None where it is several."""

    host: str
    port: int
    requests: list[bytes]
    process: int | None = None


@dataclass
class Level:
    """One number of clients, a number a round: requests/s, latencies, and CPU seconds for each request."""

    per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    client_ms: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    artifacts, output = Path(given.get("artifacts", ROOT / "artifacts")), Path(given.get("output", OUTPUT))
    steps = [int(count) for count in given.get("clients", CLIENTS).split(",")]
    seconds = float(given.get("seconds", SECONDS))
    package = artifacts / "package"
    files = jpegs(package)
    found: dict[str, dict[int, Level]] = defaultdict(lambda: defaultdict(Level))
    tower: dict[str, list[float]] = defaultdict(list)
    classifier = ZeroShotClassifier.open(package, allow_spinning=False)
    prepared = [classifier.prepare(decode(file, "a file of ours")) for file in files]
    with ExitStack() as stack:
        contestants = ours(stack.enter_context(running(package)), files)
        triton = stack.enter_context(triton_of(artifacts / "triton" / "python", files, prepared))
        contestants |= triton if isinstance(triton, dict) else {}
        for turn in range(-1, ROUNDS):  # the first one warms up
            time_tower(classifier, prepared, tower if turn >= 0 else defaultdict(list), seconds)
            for clients in steps if turn >= 0 else steps[::3]:
                for name, contestant in contestants.items():
                    measure(contestant, clients, found[name][clients] if turn >= 0 else Level(), seconds)
            print(f"round {turn + 1} of {ROUNDS}", flush=True)
    record = {
        "target": read_package(package).encoder.towers.vision.target,
        "triton": "measured" if isinstance(triton, dict) else triton,
        "seconds": seconds,
        "rounds": ROUNDS,
        "tower": {name: spread(values) for name, values in tower.items()},
        "levels": {
            name: {clients: measured(level) for clients, level in levels.items()} for name, levels in found.items()
        },
        "goals": goals(found, tower),
        "machine": asdict(hardware()),
    }
    write_text(output, json.dumps(record, indent=2) + "\n")
    show(found, tower)
    print(json.dumps(record["goals"], indent=1))


def jpegs(package: Path) -> list[bytes]:
    """Pictures in the model's own size."""
    height, width = read_package(package).encoder.image_size or (224, 224)
    images = [scenes.render("serve", row, row % len(scenes.CLASSES))[0] for row in range(IMAGES)]
    return [saved(image.resize((width, height), Image.Resampling.BICUBIC), "JPEG", quality=90) for image in images]


def ours(server: Any, files: Sequence[bytes]) -> dict[str, Contestant]:
    images = [encoded(file) for file in files]
    embeddings = [post(EMBEDDINGS, {"input": [{"image": image}], "encoding_format": "base64"}) for image in images]
    zero_shot = [post(ZERO_SHOT, {"image": image, "labels": LABELS}) for image in images]
    known = server.host, server.port
    return {
        "embeddings": Contestant(*known, embeddings, server.process.pid),
        "zero-shot": Contestant(*known, zero_shot, server.process.pid),
    }


@contextmanager
def triton_of(
    repository: Path, files: Sequence[bytes], prepared: Sequence[Any]
) -> Iterator[dict[str, Contestant] | str]:
    """Or why there is none."""
    if not repository.is_dir():
        yield "not asked: these artifacts hold no model repository"
        return
    with ExitStack() as stack:
        try:
            environment = find_environment(ROOT / "build" / "triton-venv")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(serve_triton(repository, environment, folder / "server.log"))
        except (UnavailableError, DeployError, OSError) as error:
            yield str(error)
            return
        labels = np.array([[label.encode()] for label in LABELS], dtype=object)
        asked = [{"encoded": np.array([[file]], dtype=object), "texts": labels} for file in files]
        yield {
            "Triton zero-shot": triton_requests(server.http, "clip_zero_shot", asked),
            "Triton pixels": triton_requests(
                server.http, "clip_vision", [{"pixel_values": pixels[None]} for pixels in prepared]
            ),
        }


def triton_requests(port: int, model: str, asked: Sequence[dict[str, np.ndarray]]) -> Contestant:
    """In the protocol's binary form, as its own client library sends it."""
    return Contestant("127.0.0.1", port, [triton_request(model, inputs) for inputs in asked])


def triton_request(model: str, inputs: dict[str, np.ndarray], binary: bool = True) -> bytes:
    """For all outputs of a model, in the protocol's binary form; its answer in that form too, or as JSON."""
    parts = {name: raw(array) for name, array in inputs.items()}
    described = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": DATATYPES[array.dtype.name],
            "parameters": {"binary_data_size": len(parts[name])},
        }
        for name, array in inputs.items()
    ]
    head = json.dumps({"inputs": described, "parameters": {"binary_data_output": binary}}).encode()
    body = head + b"".join(parts.values())
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        "Host: localhost",
        f"Inference-Header-Content-Length: {len(head)}",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def time_tower(
    classifier: ZeroShotClassifier, prepared: Sequence[Any], found: dict[str, list[float]], seconds: float
) -> None:
    """Images/s in batches and one by one, the p50 of one, and CPU milliseconds of each image in a batch."""
    for name, size in (("batches", BATCH), ("one", 1)):
        times, computed, end = [], time.process_time(), time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            classifier.encode_prepared(prepared[:size])
            times.append(time.perf_counter() - began)
        found[f"{name}_per_s"].append(size * len(times) / sum(times))
        found[f"{name}_p50_ms"].append(1e3 * median(times))
        found[f"{name}_cpu_ms"].append(1e3 * (time.process_time() - computed) / (size * len(times)))


def measure(contestant: Contestant, clients: int, level: Level, asking: float) -> None:
    """Ask for so many seconds and add what was found."""
    computed, served = time.process_time(), cpu_s(contestant.process)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        latencies, seconds = runner.run(ask_all(contestant, clients, asking))
    level.per_s.append(len(latencies) / seconds)
    level.p50_ms.append(1e3 * float(np.percentile(latencies, 50)))
    level.p99_ms.append(1e3 * float(np.percentile(latencies, 99)))
    level.client_ms.append(1e3 * (time.process_time() - computed) / len(latencies))
    if contestant.process:
        level.server_ms.append(1e3 * (cpu_s(contestant.process) - served) / len(latencies))


async def ask_all(contestant: Contestant, clients: int, asking: float) -> tuple[list[float], float]:
    """Latencies in seconds, and the seconds from the first request to the last answer."""
    latencies: list[float] = []
    began = time.perf_counter()
    end = began + asking

    async def ask(first: int) -> None:
        connection, row = Connection(contestant.host, contestant.port), first
        try:
            while (sent := time.perf_counter()) < end:
                answer = await connection.ask(contestant.requests[row % len(contestant.requests)])
                if answer.status != 200:
                    raise DeployError(f"status {answer.status}: {answer.body[:200]!r}")
                latencies.append(time.perf_counter() - sent)
                row += clients
        finally:
            connection.close()

    await asyncio.gather(*map(ask, range(clients)))
    return latencies, time.perf_counter() - began


def cpu_s(process: int | None) -> float:
    """That a process used so far."""
    if process is None:
        return 0.0
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def goals(found: dict[str, dict[int, Level]], tower: dict[str, list[float]]) -> dict[str, object]:
    """What is to be reached, in what was measured.

    `shared_per_s` is what client, server and tower could reach together with all cores busy, by the CPU time of each
    request at 32 clients: the cores that the tower alone has to itself.
    """
    levels = found["embeddings"]
    busy = [client + server for client, server in zip(levels[32].client_ms, levels[32].server_ms, strict=True)]
    shared = [1e3 * cores() / ms for ms in busy]
    beside: dict[str, object] = {
        f"over {name} at {clients}": spread(ratios(found[own][clients].per_s, level.per_s))
        for own, name in (("zero-shot", "Triton zero-shot"), ("embeddings", "Triton pixels"))
        if name in found
        for clients, level in found[name].items()
    }
    return beside | {
        "of the tower's rate at 32": spread(ratios(levels[32].per_s, tower["batches_per_s"])),
        "shared_per_s": spread(shared),
        "of what sharing allows at 32": spread(ratios(levels[32].per_s, shared)),
        "p50 of one beyond the tower's, ms": spread(
            [ours - alone for ours, alone in zip(levels[1].p50_ms, tower["one_p50_ms"], strict=True)]
        ),
    }


def ratios(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(left, right, strict=True)]


def spread(values: Sequence[float]) -> list[float]:
    """Median, lowest and highest."""
    return [round(value, 3) for value in (median(values), min(values), max(values))]


def measured(level: Level) -> dict[str, list[float]]:
    return {name: spread(values) for name, values in asdict(level).items() if values}


def show(found: dict[str, dict[int, Level]], tower: dict[str, list[float]]) -> None:
    print(", ".join(f"tower {name} {median(values):.2f}" for name, values in tower.items()))
    for name, levels in found.items():
        for clients, level in levels.items():
            rate, p50, p99 = (median(values) for values in (level.per_s, level.p50_ms, level.p99_ms))
            print(f"{name}, {clients} clients: {rate:,.0f}/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms")


if __name__ == "__main__":
    main()
