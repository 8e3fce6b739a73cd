"""A client of Triton, in the server's environment: one request and its answer."""

import re
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import np_to_triton_dtype

from clip_deploy.core.errors import first_line
from clip_deploy.serving.job import ClientJob

TIMEOUT_S = 60.0  # of one request
SAME = 0.99  # cosine of one image's embeddings, whoever was batched with it: of the two versions it is -1
SAME_ANSWER = 0.01  # largest difference of one question's probabilities
PROTOCOLS: dict[str, ModuleType] = {"http": http, "grpc": grpc}


class Client:
    """One protocol's client: arrays in, arrays out. Use it in one thread."""

    def __init__(self, job: ClientJob, protocol: str) -> None:
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
        found: str = response["model_version"] if self.protocol == "http" else response.model_version
        return found


def embed_images(client: Client, job: ClientJob, images: np.ndarray) -> np.ndarray:
    """Image embeddings [images, width] of what the image tower takes."""
    found: np.ndarray = client.infer("clip_vision", {job.image_input: images}).as_numpy("image_embeds")
    return found


def embed_texts(client: Client, job: ClientJob, batch: int) -> np.ndarray:
    """Text embeddings [texts, width] of one batch of the job."""
    inputs = {name: job.batches(name)[batch] for name in job.text_inputs}
    found: np.ndarray = client.infer("clip_text", inputs).as_numpy("text_embeds")
    return found


def ask(client: Client, job: ClientJob, row: int) -> np.ndarray:
    """Probabilities [1, labels] of one image file; files are uint8 rows, padded, behind their lengths."""
    content = job.inputs["files"][row][: job.inputs["lengths"][row]].tobytes()
    texts = np.array([[label.encode()] for label in job.inputs["labels"]], dtype=object)
    inputs = {"encoded": np.array([[content]], dtype=object), "texts": texts}
    found: np.ndarray = client.infer("clip_zero_shot", inputs).as_numpy("probabilities")
    return found


def together(calls: list[Callable[[], None]]) -> None:
    """Make all calls at once, each in a thread, and wait for them."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def question(client: Client, job: ClientJob) -> np.ndarray | None:
    """Probabilities of one image file among the labels; None where the data have fewer than two."""
    return ask(client, job, 0) if len(job.inputs.get("labels", ())) > 1 else None


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of two vectors [width]; -1 to 1."""
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def short(error: Exception) -> str:
    """The first line of what the server said, without this machine's paths and addresses."""
    line = first_line(error)
    line = re.sub(
        r" at 0x[0-9a-f]+", "", re.sub(r"(/[\w.+-]+){3,}", "...", line.replace("[request id: <id_unknown>] ", ""))
    )
    return line if len(line) <= 160 else line[:157] + "..."
