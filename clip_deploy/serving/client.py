"""What clients do to a running server: golden inputs, versions, faults. A program for the server's own environment.

    PYTHON -m clip_deploy.serving.client JOB     reads JOB/job.json and JOB/inputs.npz, writes answers.json, answers.npz

It imports numpy and tritonclient only, and nothing else of this project but its neighbour `faults`.
"""

import json
import re
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

TIMEOUT_S = 60.0  # of one request
NEIGHBOURS = 8  # clients that send at once
MODELS = ("clip_preprocess", "clip_score", "clip_text", "clip_tokenize", "clip_vision", "clip_zero_shot")
ENDPOINTS = ("/v2/health/live", "/v2/health/ready", *(f"/v2/models/{model}/ready" for model in MODELS))
PROTOCOLS: dict[str, ModuleType] = {"http": http, "grpc": grpc}


@dataclass
class Job:
    """Where the server is and what its towers take.

    Attributes:
        ports: by protocol.
        repository: the server's own copy, which may be changed.
        image_input: of clip_vision; text_inputs: of clip_text.
        max_batch: images in one call.
    """

    ports: dict[str, int]
    repository: str
    image_input: str
    text_inputs: list[str]
    max_batch: int
    inputs: dict[str, np.ndarray] = field(default_factory=dict)

    def batches(self, name: str) -> list[np.ndarray]:
        """Arrays that are named name_0, name_1 and so on."""
        count = sum(key.removeprefix(f"{name}_").isdigit() for key in self.inputs)
        return [self.inputs[f"{name}_{row}"] for row in range(count)]


class Client:
    """One protocol's client: arrays in, arrays out. Use it in one thread."""

    def __init__(self, job: Job, protocol: str) -> None:
        self.library, address = PROTOCOLS[protocol], f"127.0.0.1:{job.ports[protocol]}"
        limits = {"connection_timeout": TIMEOUT_S, "network_timeout": TIMEOUT_S} if protocol == "http" else {}
        self.inner = self.library.InferenceServerClient(address, **limits)
        self.limit = {"client_timeout": TIMEOUT_S} if protocol == "grpc" else {}
        self.protocol = protocol

    def infer(self, model: str, inputs: dict[str, np.ndarray], version: str = "") -> Any:
        given = []
        for name, array in inputs.items():
            given.append(self.library.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
            given[-1].set_data_from_numpy(array)
        return self.inner.infer(model, given, model_version=version, **self.limit)

    def version_of(self, answer: Any) -> str:
        response = answer.get_response()
        return response["model_version"] if self.protocol == "http" else response.model_version


def main(folder: Path) -> None:
    job = Job(**json.loads((folder / "job.json").read_text()), inputs=dict(np.load(folder / "inputs.npz")))
    from clip_deploy.serving.faults import provoke

    arrays: dict[str, np.ndarray] = {}
    for protocol in PROTOCOLS:
        arrays |= {f"{protocol}_{name}": array for name, array in golden(job, protocol).items()}
    arrays["together"] = encode_together(job)
    record = {"versions": change_versions(job), "faults": provoke(job), "health": health(job)}
    np.savez(folder / "answers.npz", **arrays)  # type: ignore[arg-type]
    (folder / "answers.json").write_text(json.dumps(record))


def golden(job: Job, protocol: str) -> dict[str, np.ndarray]:
    """Both towers' embeddings of the golden set, and the ensemble's probabilities of image files with texts."""
    client = Client(job, protocol)
    found = {
        "images": np.concatenate([embed_images(client, job, batch) for batch in job.batches("images")]),
        "moved": np.concatenate([embed_images(client, job, batch) for batch in job.batches("moved")]),
        "texts": np.concatenate([embed_texts(client, job, row) for row in range(len(job.batches("input_ids")))]),
    }
    if "labels" in job.inputs:
        found["probabilities"] = np.concatenate([ask(client, job, row) for row in range(len(job.inputs["files"]))])
    return found


def embed_images(client: Client, job: Job, images: np.ndarray) -> np.ndarray:
    return client.infer("clip_vision", {job.image_input: images}).as_numpy("image_embeds")


def embed_texts(client: Client, job: Job, batch: int) -> np.ndarray:
    inputs = {name: job.batches(name)[batch] for name in job.text_inputs}
    return client.infer("clip_text", inputs).as_numpy("text_embeds")


def ask(client: Client, job: Job, row: int) -> np.ndarray:
    """Probabilities [1, labels] of one image file; files are uint8 rows, padded, behind their lengths."""
    content = job.inputs["files"][row][: job.inputs["lengths"][row]].tobytes()
    texts = np.array([[label.encode()] for label in job.inputs["labels"]], dtype=object)
    inputs = {"encoded": np.array([[content]], dtype=object), "texts": texts}
    return client.infer("clip_zero_shot", inputs).as_numpy("probabilities")


def encode_together(job: Job) -> np.ndarray:
    """The first batch again, image by image from several clients at once: the server batches them with one another."""
    images = job.batches("images")[0]
    found: dict[int, np.ndarray] = {}

    def work(first: int) -> None:
        client = Client(job, "grpc")
        for row in range(first, len(images), NEIGHBOURS):
            found[row] = embed_images(client, job, images[row : row + 1])

    together([partial(work, first) for first in range(NEIGHBOURS)])
    return np.concatenate([found[row] for row in range(len(images))])


def together(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def health(job: Job) -> dict[str, int]:
    """HTTP status of each endpoint that a probe asks."""
    answers = {}
    for path in ENDPOINTS:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{job.ports['http']}{path}", timeout=TIMEOUT_S) as answer:
                answers[path] = answer.status
        except urllib.error.HTTPError as error:
            answers[path] = error.code
    return answers


class Traffic:
    """A client that asks for one embedding again and again while something else happens; errors are counted."""

    def __init__(self, job: Job) -> None:
        self.job, self.sent, self.failed, self.ended = job, 0, 0, threading.Event()
        self.thread = threading.Thread(target=self._send, daemon=True)

    def __enter__(self) -> "Traffic":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _send(self) -> None:
        client, image = Client(self.job, "grpc"), self.job.batches("images")[0][:1]
        while not self.ended.is_set():
            self.sent += 1
            try:
                embed_images(client, self.job, image)
            except InferenceServerException:
                self.failed += 1


def change_versions(job: Job) -> list[dict[str, Any]]:
    """Load version 2 beside 1, refuse a broken version 3, roll back; all of it under traffic."""
    model = Path(job.repository) / "clip_vision"
    steps = []
    with Traffic(job) as traffic:
        shutil.copytree(model / "1", model / "2")
        steps.append(step(job, "version 2 is loaded beside version 1", ["1", "2"], traffic))
        shutil.copytree(model / "1", model / "3")
        (model / "3" / "model.onnx").write_bytes(b"broken")
        steps.append(step(job, "a broken version 3 is refused", ["1", "2"], traffic))
        for version in ("2", "3"):
            shutil.rmtree(model / version)
        steps.append(step(job, "rolled back to version 1", ["1"], traffic))
    return steps


def step(job: Job, name: str, expected: list[str], traffic: Traffic) -> dict[str, Any]:
    """Let the server look at the repository again: which versions answer, and which one where a client names none."""
    client, image = Client(job, "http"), job.batches("images")[0][:1]
    failed, refused = traffic.failed, ""
    try:
        client.inner.load_model("clip_vision")
    except InferenceServerException as error:
        refused = short(error)
    ready = [version for version in ("1", "2", "3") if client.inner.is_model_ready("clip_vision", version)]
    answer = client.infer("clip_vision", {job.image_input: image})
    return {
        "step": name,
        "ready": ready,
        "answers": client.version_of(answer),
        "refused": refused,
        "as_expected": ready == expected and client.version_of(answer) == expected[-1],
        "same": all(same(client, job, image, version, answer.as_numpy("image_embeds")) for version in ready),
        "sent": traffic.sent,
        "failed": traffic.failed - failed,
    }


def same(client: Client, job: Job, image: np.ndarray, version: str, expected: np.ndarray) -> bool:
    found = client.infer("clip_vision", {job.image_input: image}, version).as_numpy("image_embeds")
    return bool(np.array_equal(found, expected))


def short(error: Exception) -> str:
    """The first line of what the server said, without this machine's paths and addresses."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    line = re.sub(
        r" at 0x[0-9a-f]+", "", re.sub(r"(/[\w.+-]+){3,}", "...", line.replace("[request id: <id_unknown>] ", ""))
    )
    return line if len(line) <= 160 else line[:157] + "..."


if __name__ == "__main__":
    main(Path(sys.argv[1]))
