"""Reads hostile files one by one, each in a fork with bounded memory and time: python hostile.py, a request a line.

A request is [reader, folder], the answer [outcome, what was said]. A native library that crashes ends one fork.
"""

import json
import os
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.clip import modeling_clip, processing_clip  # noqa: F401 - loaded once, before the forks

from clip_deploy import checkpoint as checkpoints
from clip_deploy.core.config import Gate, GatesConfig
from clip_deploy.core.errors import DeployError
from clip_deploy.images import Preprocessor, read_image
from clip_deploy.prepared import Prepared, Texts, load_prepared
from clip_deploy.validation import validate_apart

MEMORY = 6 << 30  # of address space, above what is mapped already
LIMIT_S = 120  # a busy machine must not look like a hang
ROWS = 8


def read_checkpoint(folder: Path) -> None:
    checkpoints.verify(folder)
    checkpoints.describe(folder)
    checkpoints.load_model(folder)


def read_graph(folder: Path) -> None:
    """Judge the target in folder/target on a few rows; one that fails its gate is refused with the gate's words."""
    gates = GatesConfig(fp32=Gate(min_cosine=0.9999), max_seconds=LIMIT_S / 2)
    record = validate_apart(folder / "target", few(load_prepared(folder / "set")), folder / "few.npz", gates, 0)
    if record["status"] != "pass":
        raise DeployError("; ".join(record["reasons"]))


def few(prepared: Prepared) -> Prepared:
    """The first rows, without classes."""
    captions = prepared.captions[:ROWS]
    none = Texts(captions.input_ids[:0], captions.attention_mask[:0])
    rows, manifest = np.arange(ROWS), {**prepared.manifest, "classes": [], "templates": []}
    return Prepared(prepared.pixel_values[:ROWS], captions, rows, rows, none, prepared.labels[:0], manifest)


def read_picture(folder: Path) -> None:
    """Read folder/image and hold its pixels against those of the checkpoint's own processor."""
    path = folder / "image"
    image = read_image(path)
    ours = Preprocessor(**json.loads((folder / "preprocessor.json").read_text()))
    with Image.open(path) as given:
        if given.mode.startswith("I;16"):
            return  # its processor clips what is above 255; ours keeps the upper 8 bits, as README says
        own = checkpoints.load_processor(folder / "checkpoint").image_processor
        expected = own([given], return_tensors="np")["pixel_values"][0]
    assert np.abs(ours(image) - expected).max() < 1e-5, "other pixels than the checkpoint's processor"


READERS = {"checkpoint": read_checkpoint, "graph": read_graph, "picture": read_picture}


def in_fork(reader: str, folder: Path) -> tuple[str, str]:
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(sender, json.dumps(bounded(reader, folder)).encode()[:60000])
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as answers:
        answer = answers.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer:
        return json.loads(answer)
    return "wrong", "hung" if code == -signal.SIGALRM else f"crashed: {code}"


def bounded(reader: str, folder: Path) -> tuple[str, str]:
    """The outcome of one reading, in a process that may not take all memory or go on for ever."""
    signal.alarm(LIMIT_S)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")
    try:
        READERS[reader](folder)
    except DeployError as error:
        said = str(error)
        return ("refused" if said.strip() and len(said.splitlines()) == 1 else "wrong"), said[:2000]
    except BaseException:
        return "wrong", traceback.format_exc()[-4000:]
    return "accepted", ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        name, where = json.loads(line)
        print(json.dumps(in_fork(name, Path(where))), file=answers)
