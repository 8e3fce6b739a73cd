"""What clients do to a running server: golden inputs, versions, faults. A program for the server's own environment.

    PYTHON -m clip_deploy.serving.client JOB     reads JOB/job.json and JOB/inputs.npz, writes answers.json, answers.npz

It imports numpy and tritonclient only, and of this project what needs no library: `faults`, `publish` and `core`.
"""

import json
import re
import sys
import threading
import time
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
from tritonclient.utils import np_to_triton_dtype

from clip_deploy.core.errors import DeployError
from clip_deploy.serving.publish import PARTS, WHOLE, publish, withdraw

TIMEOUT_S = 60.0  # of one request
STEP_REQUESTS = 50  # that another client sends at each step, at least
STEP_S = 60.0  # until they must have sent them
SAME = 0.99  # cosine of one image's embeddings, whoever was batched with it: of the two versions it is -1
SAME_ANSWER = 0.01  # largest difference of one question's probabilities
NEIGHBOURS = 8  # clients that send at once
ENDPOINTS = ("/v2/health/live", "/v2/health/ready", *(f"/v2/models/{model}/ready" for model in (*PARTS, WHOLE)))
PROTOCOLS: dict[str, ModuleType] = {"http": http, "grpc": grpc}


@dataclass
class Job:
    """Where the server is and what its towers take.

    Attributes:
        ports: by protocol.
        repository: the server's own copy, which may be changed.
        second: another repository, whose image embeddings are the first one's negated.
        broken: one whose image tower does not load.
        image_input: of clip_vision; text_inputs: of clip_text.
        max_batch: images in one call.
    """

    ports: dict[str, int]
    repository: str
    second: str
    broken: str
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
        except OSError:
            answers[path] = 0
    return answers


class Traffic:
    """A client that asks for one embedding and one question's answer again and again while something else happens.

    Attributes:
        sent, failed: requests since the last `restart`; error: what the last that failed met.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.ended = job, threading.Event()
        self.sent, self.failed, self.error = 0, 0, ""
        self.thread = threading.Thread(target=self._send, daemon=True)

    def __enter__(self) -> "Traffic":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def restart(self) -> None:
        self.sent, self.failed, self.error = 0, 0, ""

    def wait(self, sent: int) -> None:
        """Until so many requests were sent, or STEP_S have passed."""
        end = time.monotonic() + STEP_S
        while self.sent < sent and time.monotonic() < end:
            time.sleep(0.01)

    def _send(self) -> None:
        client, image = Client(self.job, "grpc"), self.job.batches("images")[0][:1]
        while not self.ended.is_set():
            for send in (partial(embed_images, client, self.job, image), partial(question, client, self.job)):
                try:
                    send()
                except Exception as error:  # whatever it is, a client would have met it
                    self.failed, self.error = self.failed + 1, short(error)
                self.sent += 1


def change_versions(job: Job) -> list[dict[str, Any]]:
    """Add version 2, have a broken version 3 refused, go back to version 1; all of it while clients go on asking."""
    repository, url = Path(job.repository), f"http://127.0.0.1:{job.ports['http']}"
    add, both = partial(publish, served=repository, url=url), ["1", "2"]
    with Traffic(job) as traffic:
        asked = Asked(job, traffic)
        return [
            asked.step("version 2 is added", partial(add, Path(job.second)), both),
            asked.step("a broken version 3 is refused", partial(add, Path(job.broken)), both),
            asked.step("back to version 1", partial(withdraw, repository, "2", url), ["1"]),
        ]


class Asked:
    """One image and one question, asked again at every step."""

    def __init__(self, job: Job, traffic: Traffic) -> None:
        self.traffic = traffic
        self.job, self.client, self.image = job, Client(job, "http"), job.batches("images")[0][:1]
        first = embed_images(self.client, job, self.image)
        self.embeddings, self.answer = {"1": first, "2": -first}, question(self.client, job)

    def step(self, name: str, change: Callable[[], object], expected: list[str]) -> dict[str, Any]:
        """Which versions answer after a change, which one where none is named, and whether by their own weights."""
        self.traffic.restart()
        refused = ""
        try:
            change()
        except DeployError as error:
            refused = short(error)
        self.traffic.wait(STEP_REQUESTS)
        counted = {"sent": self.traffic.sent, "failed": self.traffic.failed, "error": self.traffic.error}
        ready = [version for version in ("1", "2", "3") if self.client.inner.is_model_ready("clip_vision", version)]
        newest = self.client.version_of(self._embed(""))
        return {
            "step": name,
            "ready": ready,
            "answers": newest,
            "refused": refused,
            "as_expected": ready == expected and newest == expected[-1],
            "right": all(self._is_right(version) for version in ["", *ready]) and self._answers_by(newest),
            **counted,
        }

    def _embed(self, version: str) -> Any:
        return self.client.infer("clip_vision", {self.job.image_input: self.image}, version)

    def _is_right(self, version: str) -> bool:
        """Whether a version, by its number or as the newest, gives the embedding that is its own."""
        answer = self._embed(version)
        found, expected = answer.as_numpy("image_embeds")[0], self.embeddings.get(self.client.version_of(answer))
        return expected is not None and cosine(found, expected[0]) > SAME

    def _answers_by(self, version: str) -> bool:
        """Whether the ensemble answers by that version's towers."""
        found = question(self.client, self.job)
        if found is None or self.answer is None:
            return True
        return bool(np.abs(found - self.answer).max() < SAME_ANSWER) == (version == "1")


def question(client: Client, job: Job) -> np.ndarray | None:
    """Probabilities of one image file among the labels; None where the data have fewer than two."""
    return ask(client, job, 0) if len(job.inputs.get("labels", ())) > 1 else None


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def short(error: Exception) -> str:
    """The first line of what the server said, without this machine's paths and addresses."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    line = re.sub(
        r" at 0x[0-9a-f]+", "", re.sub(r"(/[\w.+-]+){3,}", "...", line.replace("[request id: <id_unknown>] ", ""))
    )
    return line if len(line) <= 160 else line[:157] + "..."


if __name__ == "__main__":
    main(Path(sys.argv[1]))
