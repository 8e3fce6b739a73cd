"""The inputs that every contestant gets, and the calibration set, made once with the checkpoint's own processor."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.worker import input_names
from clip_deploy.checkpoint.load import load_processor
from clip_deploy.core.artifact import read_target
from clip_deploy.core.config import DataConfig
from clip_deploy.core.model import Model
from clip_deploy.data.dataset import Dataset, load
from clip_deploy.data.preprocessed import tokenize

BATCHES = (1, 8)
SHORT_TOKENS = 8
CALIBRATION_SAMPLES = 96  # as conf/data/shapes.yaml


def text_lengths(model: Model) -> list[int]:
    """The whole context and, where texts need not be padded to it, a short text."""
    return [model.context_length] if model.pad_to_context else [model.context_length, SHORT_TOKENS]


def cases(model: Model) -> list[dict[str, Any]]:
    """The requests of one run, in the order of the table."""
    lengths = [("vision", None), *(("text", tokens) for tokens in text_lengths(model))]
    return [{"tower": tower, "batch": batch, "tokens": tokens} for tower, tokens in lengths for batch in BATCHES]


def paddings(model: Model) -> list[list[dict[str, Any]]]:
    """Pairs of requests: short texts as they are, and the same texts padded to the whole context."""
    whole, *short = text_lengths(model)
    return [
        [{"tower": "text", "batch": batch, "tokens": tokens, "padded_to": to} for to in (None, whole)]
        for tokens in short
        for batch in BATCHES
    ]


def write_inputs(checkpoint: Path, inputs: Path, calibration: Path) -> None:
    """Rendered scenes and their captions: real inputs, so that a cosine says something, in two .npz files.

    inputs holds pixel_values [8, 3, height, width] and, for each text length, input_ids_<tokens> and
    attention_mask_<tokens> [8, tokens], the short ones padded as well, under <tokens>_in_<context>; calibration holds
    pixel_values, input_ids and attention_mask of 96 others.
    """
    model, processor = read_target(checkpoint).model, load_processor(checkpoint)
    dataset = load(DataConfig(evaluation_samples=max(BATCHES), calibration_samples=CALIBRATION_SAMPLES), seed=0)
    arrays = {"pixel_values": pixels(dataset, "evaluation", processor)}
    for tokens in text_lengths(model):
        for length in {tokens, model.context_length}:
            found = texts(dataset, "evaluation", processor, model, tokens, length)
            arrays |= dict(zip(input_names("text", tokens, length), found, strict=True))
    inputs.parent.mkdir(parents=True, exist_ok=True)
    np.savez(inputs, **arrays)  # type: ignore[arg-type]
    ids, mask = texts(dataset, "calibration", processor, model, *[model.context_length] * 2)
    images = pixels(dataset, "calibration", processor)
    np.savez(calibration, pixel_values=images, input_ids=ids, attention_mask=mask)


def pixels(dataset: Dataset, name: str, processor: Any) -> np.ndarray:
    images = [sample.open() for sample in getattr(dataset, name)]
    found: np.ndarray = processor.image_processor(images, return_tensors="np")["pixel_values"].astype(np.float32)
    return found


def texts(
    dataset: Dataset, name: str, processor: Any, model: Model, tokens: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first caption of each sample, cut to `tokens` and padded to `length`."""
    captions = [sample.captions[0] for sample in getattr(dataset, name)]
    tokenized = tokenize(processor, replace(model, context_length=tokens), captions)
    padded = tokenized.padded(length, int(processor.tokenizer.pad_token_id or 0))
    return padded.input_ids, padded.attention_mask
