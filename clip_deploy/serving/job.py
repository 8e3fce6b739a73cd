"""What the client's program is given: it runs in the server's environment, and so in a process of its own."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from clip_deploy.core.parsing import plain, read_record

JOB, INPUTS = "job.json", "inputs.npz"  # in the program's folder
ASKED, ANSWERS = "answers.json", "answers.npz"  # that it leaves there: served.Asked, and arrays by protocol and name


@dataclass(frozen=True)
class ClientJob:
    """Where the server is, what its towers take, and what they are sent.

    Attributes:
        ports: by protocol.
        repository: the server's own copy, which may be changed.
        second: another repository, whose image embeddings are the first one's negated.
        broken: one whose image tower does not load.
        image_input: of clip_vision; text_inputs: of clip_text.
        max_batch: images in one call.
        inputs: golden.golden_inputs.
    """

    ports: dict[str, int]
    repository: str
    second: str
    broken: str
    image_input: str
    text_inputs: list[str]
    max_batch: int
    inputs: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        (folder / JOB).write_text(json.dumps(plain(replace(self, inputs={}))))
        np.savez(folder / INPUTS, **self.inputs)  # type: ignore[arg-type]

    @classmethod
    def read(cls, folder: Path) -> "ClientJob":
        with np.load(folder / INPUTS) as inputs:
            return replace(read_record(cls, folder / JOB), inputs=dict(inputs))

    def batches(self, name: str) -> list[np.ndarray]:
        return stored(self.inputs, name)


def stored(inputs: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    """Arrays that are named name_0, name_1 and so on."""
    count = sum(key.removeprefix(f"{name}_").isdigit() for key in inputs)
    return [inputs[f"{name}_{row}"] for row in range(count)]
