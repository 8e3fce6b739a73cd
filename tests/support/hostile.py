"""Reads hostile files one by one, each in a fork with bounded memory and time: python hostile.py, a request a line.

A request is [reader, folder], the answer [outcome, what was said]. A native library that crashes ends one fork.
"""

import json
import os
import resource
import shutil
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor
from transformers.models.clip import modeling_clip, processing_clip  # noqa: F401 - loaded once, before the forks

from clip_deploy.builders.processor_files import write_portable
from clip_deploy.checkpoint import fetch
from clip_deploy.checkpoint import load as checkpoints
from clip_deploy.checkpoint.lint import lint
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import GateLimits, GatesConfig, ModelConfig
from clip_deploy.core.errors import DeployError
from clip_deploy.core.images import BROKEN_EXIF, read_image
from clip_deploy.core.package import read_preprocessing
from clip_deploy.data import scenes
from clip_deploy.data.preprocessed import Prepared, Texts, load_prepared, pad_token_of, tokenize
from clip_deploy.evaluate.validation import validate_apart
from clip_deploy.inference.tokenizer import Tokenizer
from clip_deploy.runtimes import open_encoder

MEMORY = 6 << 30  # of address space, above what is mapped already
LIMIT_S = 120  # a busy machine must not look like a hang
ROWS = 8
FINDINGS = "the checkpoint would give wrong answers"


def read_checkpoint(folder: Path) -> None:
    """Take folder/checkpoint in as `download` does, and hold our reading of it against transformers' own."""
    target, portable = (folder / name for name in ("torch-fp32", "portable"))
    for made in (target, portable):
        shutil.rmtree(made, ignore_errors=True)
    portable.mkdir()
    build(target, lambda output: checked(ModelConfig(path=str(folder / "checkpoint")), output), Target("eager", "fp32"))
    write_portable(target, portable)
    images, texts = own_embeddings(folder / "checkpoint")
    assert not one_for_all(images), "all images get one embedding"
    assert not one_for_all(texts), "all texts get one embedding"
    encoder, model, processor = open_encoder(target), read_target(target).model, checkpoints.load_processor(target)
    pixels = processor.image_processor(PHOTOS, return_tensors="np")["pixel_values"]
    tokens = tokenize(processor, model, WORDS)
    assert alike(encoder.encode_images(pixels), images), "another image embedding than transformers'"
    assert alike(encoder.encode_texts(tokens.input_ids, tokens.attention_mask), texts), "another text embedding"
    if (packed := portable / "preprocessor.json").is_file():
        ours = read_preprocessing(packed.parent)
        assert max(np.abs(ours(photo) - own).max() for photo, own in zip(PHOTOS, pixels, strict=True)) < 1e-4, (
            "the package sees other pixels than transformers"
        )
    if (packed := portable / "tokenizer.json").is_file():
        own = Tokenizer(packed, model.context_length, model.pad_to_context, pad_token_of(processor))
        assert np.array_equal(own(WORDS)["input_ids"], tokens.input_ids), "the package reads other tokens"


def checked(model: ModelConfig, output: Path) -> Target:
    target = fetch.fetch(model, output)
    lint(output, model, target.model)
    checkpoints.load_model(output)  # as every stage after `download`
    return target


def own_embeddings(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of PHOTOS and WORDS, of unit length, by transformers alone."""
    model, processor = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)
    given = processor(text=WORDS, images=PHOTOS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        found = model.eval()(**given)
    return found.image_embeds.numpy(), found.text_embeds.numpy()


def alike(ours: np.ndarray, own: np.ndarray) -> bool:
    """Cosines above 0.9999 in each row; `own` is of unit length. A row that overflows must overflow in both."""
    finite = np.isfinite(own).all(1)
    close = np.sum(ours * own, 1) > 0.9999 * np.linalg.norm(ours, axis=1)
    return bool(np.where(finite, close, ~np.isfinite(ours).all(1)).all())


def one_for_all(rows: np.ndarray) -> bool:
    """Whether embeddings of unit length are all the same, but for rounding."""
    return bool((rows @ rows.T > 1 - 1e-6).all())


def read_graph(folder: Path) -> None:
    """Judge the target in folder/target on a few rows; one that fails its gate is refused with the gate's words."""
    gates = GatesConfig(fp32=GateLimits(min_cosine=0.9999), timeout_s=LIMIT_S / 2)
    record = validate_apart(folder / "target", few(load_prepared(folder / "set")), folder / "few.npz", gates, 0)
    if record.status != "pass":
        raise DeployError("; ".join(record.reasons))


def few(prepared: Prepared) -> Prepared:
    """The first rows, without classes."""
    captions = prepared.captions[:ROWS]
    none = Texts(captions.input_ids[:0], captions.attention_mask[:0])
    rows, contents = np.arange(ROWS), replace(prepared.contents, classes=[], templates=[])
    return Prepared(prepared.pixel_values[:ROWS], captions, rows, rows, none, prepared.labels[:0], contents)


def read_picture(folder: Path) -> None:
    """Read folder/image and hold its pixels against those of the checkpoint's own processor, which gets it upright.

    From a path the processor turns a picture itself, but then drops what is transparent where it whitens it in memory.
    """
    path = folder / "image"
    image = read_image(path)
    ours = read_preprocessing(folder)
    with Image.open(path) as given:
        if given.mode.startswith("I;16"):
            return  # its processor clips what is above 255; ours keeps the upper 8 bits, as docs/guides/package.md says
        given.load()
        with suppress(*BROKEN_EXIF):
            ImageOps.exif_transpose(given, in_place=True)
        own = checkpoints.load_processor(folder / "checkpoint").image_processor
        expected = own([given], return_tensors="np")["pixel_values"][0]
    assert np.abs(ours(image) - expected).max() < 1e-5, "other pixels than the checkpoint's processor"


PHOTOS = [scenes.render("hostile", number, kind)[0].resize((120, 90)) for number, kind in enumerate((7, 30))]
WORDS = ["a photo of a red circle", "Two BLUE squares, caf\u00e9", "x"]
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
        said = str(error).replace("\n", " ") if FINDINGS in str(error) else str(error)  # one a line, all one message
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
