"""What clients do to a running server: golden inputs, versions, faults. A program for the server's own environment.

    PYTHON -m clip_deploy.serving.client JOB     reads and writes what job.py names in the folder JOB

It imports numpy and tritonclient only, and of this project what needs no library: `faults`, `publish` and `core`.
"""

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clip_deploy.core.errors import DeployError
from clip_deploy.core.parsing import plain
from clip_deploy.core.served import Asked, VersionStep
from clip_deploy.serving.job import ANSWERS, ASKED, ClientJob
from clip_deploy.serving.publish import PARTS, WHOLE, publish, withdraw
from clip_deploy.serving.triton_client import (
    PROTOCOLS,
    SAME,
    SAME_ANSWER,
    TIMEOUT_S,
    Client,
    ask,
    cosine,
    embed_images,
    embed_texts,
    question,
    short,
    together,
)

STEP_REQUESTS = 50  # that another client sends at each step, at least
STEP_S = 60.0  # until they must have sent them
NEIGHBOURS = 8  # clients that send at once
ENDPOINTS = ("/v2/health/live", "/v2/health/ready", *(f"/v2/models/{model}/ready" for model in (*PARTS, WHOLE)))


def main(folder: Path) -> None:
    """Ask the server what ClientJob says, and leave the answers as .npz and JSON in `folder`."""
    job = ClientJob.read(folder)
    from clip_deploy.serving.faults import provoke

    arrays: dict[str, np.ndarray] = {}
    for protocol in PROTOCOLS:
        arrays |= {f"{protocol}_{name}": array for name, array in golden(job, protocol).items()}
    arrays["together"] = encode_together(job)
    asked = Asked(change_versions(job), provoke(job), health(job))
    np.savez(folder / ANSWERS, **arrays)  # type: ignore[arg-type]
    (folder / ASKED).write_text(json.dumps(plain(asked)))


def golden(job: ClientJob, protocol: str) -> dict[str, np.ndarray]:
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


def encode_together(job: ClientJob) -> np.ndarray:
    """The first batch again, image by image from several clients at once: the server batches them with one another."""
    images = job.batches("images")[0]
    found: dict[int, np.ndarray] = {}

    def work(first: int) -> None:
        client = Client(job, "grpc")
        for row in range(first, len(images), NEIGHBOURS):
            found[row] = embed_images(client, job, images[row : row + 1])

    together([partial(work, first) for first in range(NEIGHBOURS)])
    return np.concatenate([found[row] for row in range(len(images))])


def health(job: ClientJob) -> dict[str, int]:
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

    def __init__(self, job: ClientJob) -> None:
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


def change_versions(job: ClientJob) -> list[VersionStep]:
    """Add version 2, have a broken version 3 refused, go back to version 1; all of it while clients go on asking."""
    repository, url = Path(job.repository), f"http://127.0.0.1:{job.ports['http']}"
    add, both = partial(publish, served=repository, url=url), ["1", "2"]
    with Traffic(job) as traffic:
        asked = Repeated(job, traffic)
        return [
            asked.step("version 2 is added", partial(add, Path(job.second)), both),
            asked.step("a broken version 3 is refused", partial(add, Path(job.broken)), both),
            asked.step("back to version 1", partial(withdraw, repository, "2", url), ["1"]),
        ]


class Repeated:
    """One image and one question, asked again at every step."""

    def __init__(self, job: ClientJob, traffic: Traffic) -> None:
        self.traffic = traffic
        self.job, self.client, self.image = job, Client(job, "http"), job.batches("images")[0][:1]
        first = embed_images(self.client, job, self.image)
        self.embeddings, self.answer = {"1": first, "2": -first}, question(self.client, job)

    def step(self, name: str, change: Callable[[], object], expected: list[str]) -> VersionStep:
        """What answers after a change."""
        self.traffic.restart()
        refused = ""
        try:
            change()
        except DeployError as error:
            refused = short(error)
        self.traffic.wait(STEP_REQUESTS)
        sent, failed, last = self.traffic.sent, self.traffic.failed, self.traffic.error
        ready = [version for version in ("1", "2", "3") if self.client.inner.is_model_ready("clip_vision", version)]
        newest = self.client.version_of(self._embed(""))
        return VersionStep(
            step=name,
            ready=ready,
            answers=newest,
            refused=refused,
            as_expected=ready == expected and newest == expected[-1],
            right=all(self._is_right(version) for version in ["", *ready]) and self._answers_by(newest),
            sent=sent,
            failed=failed,
            error=last,
        )

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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
