"""What a deployment needs of a checkpoint besides its towers, as files that need neither torch nor transformers.

tokenizer.json for `tokenizers`, preprocessor.json for Pillow and numpy, scores.json for what turns cosines into
probabilities: each held to the checkpoint's own answer before it is kept.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clip_deploy.checkpoint import load_model, load_processor
from clip_deploy.core.artifact import read_target, write_text
from clip_deploy.core.errors import UnavailableError
from clip_deploy.heads import logit_bias, logit_scale
from clip_deploy.images import Preprocessor
from clip_deploy.prepared import PREPROCESSOR, SCORES, TOKENIZER, pad_token_of, tokenize
from clip_deploy.preprocessing import PROBES, Preprocessing, read_preprocessing
from clip_deploy.tokens import Tokenizer

if TYPE_CHECKING:
    from transformers import ProcessorMixin
    from transformers.image_processing_utils import BaseImageProcessor

CLOSE = 1e-4  # largest difference of pixel_values: float32's rounding gives 1e-6, a grey level 1e-2
PROBE_TEXTS = (
    "A Photo of two CATS, isn't it?",
    "caf\u00e9 \u2014 \u6771\u4eac \U0001f408",
    "  one   two\nthree ",
    "red " * 300,
)


def write_portable(checkpoint: Path, folder: Path) -> None:
    """Write tokenizer.json, preprocessor.json and scores.json of the target torch-fp32 into `folder`.

    What cannot be had so is left out, and scores.json says why: {"unavailable": {file: reason}, "logit_scale": float,
    "logit_bias": float or null, "activation": "softmax" or "sigmoid"}.
    """
    processor, model = load_processor(checkpoint), read_target(checkpoint).model
    unavailable: dict[str, str] = {}

    def attempt(name: str, write: Callable[[Path], Any]) -> Any:
        try:
            return write(folder / name)
        except UnavailableError as error:
            (folder / name).unlink(missing_ok=True)
            unavailable[name] = str(error)
        return {}

    attempt(TOKENIZER, lambda path: write_tokenizer(processor, model, path))
    attempt(PREPROCESSOR, lambda path: write_preprocessor(processor.image_processor, model["image_size"], path))
    scores = attempt(SCORES, lambda path: _scores(checkpoint))
    write_text(folder / SCORES, json.dumps({**scores, "unavailable": unavailable}, indent=1) + "\n")


def _scores(checkpoint: Path) -> dict[str, Any]:
    """How the model turns cosines into probabilities."""
    model = load_model(checkpoint)
    bias = logit_bias(model)
    return {
        "logit_scale": logit_scale(model),
        "logit_bias": bias,
        "activation": "softmax" if bias is None else "sigmoid",
    }


def write_tokenizer(processor: "ProcessorMixin", model: dict[str, Any], path: Path) -> None:
    """Raises UnavailableError where `tokenizers` alone gives other tokens than the checkpoint's own tokenizer."""
    name = type(processor.tokenizer).__name__
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnavailableError(f"{name} has no fast tokenizer: save the checkpoint with one (tokenizer.json)")
    write_text(path, backend.to_str())
    own = Tokenizer(path, model["context_length"], model["pad_to_context"], pad_token_of(processor))
    texts = [*PROBE_TEXTS, "a photo of a red circle"]
    expected = tokenize(processor, model, texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a probe is meant to be cut
        actual = own(texts)
    for key in model["text_inputs"]:
        if not np.array_equal(actual[key], getattr(expected, key)):
            raise UnavailableError(f"{name} changes texts before its tokenizer.json sees them: it cannot be packaged")


def write_preprocessor(processor: "BaseImageProcessor", image_size: list[int], path: Path) -> None:
    """Raises UnavailableError where Pillow and numpy alone give other pixels than the checkpoint's own processor."""
    found = read_preprocessing(processor, range(6))  # all of Pillow's filters
    deviation = 1 / (255 * found.scale)
    record = Preprocessor(
        size=_size(found),
        crop=found.crop,
        resample=found.resample,
        rescale_factor=1 / 255,
        image_mean=[float(value) for value in -found.offset * deviation],
        image_std=[float(value) for value in deviation],
    )
    write_text(path, json.dumps(asdict(record), indent=1) + "\n")
    rng = np.random.default_rng(0)
    for height, width in PROBES if found.resample is not None else [image_size]:
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = processor(noise, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        actual = record(Image.fromarray(noise))
        if actual.shape != expected.shape or not np.abs(actual - expected).max() < CLOSE:
            raise UnavailableError(f"{type(processor).__name__} does something that Pillow and numpy alone do not")


def _size(found: Preprocessing) -> dict[str, int] | None:
    if found.resample is None:
        return None
    if found.size is not None:
        return {"height": found.size[0], "width": found.size[1]}
    return {"shortest_edge": int(found.shortest_edge or 0)}
