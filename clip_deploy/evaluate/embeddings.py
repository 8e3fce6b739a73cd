"""Run an encoder over a prepared set, and keep the embeddings."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clip_deploy.core.errors import DataError
from clip_deploy.data.preprocessed import Images, Prepared, Texts, batches
from clip_deploy.runtimes import Encoder

BATCH = 32  # images or texts in one call


@dataclass
class Embeddings:
    """Float32 [rows, dimension] each, as the encoder gives them: not normalised. Empty where the set has none."""

    images: np.ndarray
    captions: np.ndarray
    prompts: np.ndarray

    @property
    def texts(self) -> np.ndarray:
        """Captions, or the prompts where there are none."""
        return self.captions if len(self.captions) else self.prompts


def encode_set(encoder: Encoder, prepared: Prepared) -> Embeddings:
    """Embeddings of the whole set; the encoder gets pixel_values or images, as it takes them."""
    return Embeddings(
        images=encode_images(encoder, image_inputs(encoder, prepared)),
        captions=encode_texts(encoder, prepared.captions),
        prompts=encode_texts(encoder, prepared.prompts),
    )


def image_inputs(encoder: Encoder, prepared: Prepared) -> np.ndarray | Images:
    """Raises DataError where the encoder takes images and the set has none."""
    if encoder.image_input == "pixel_values":
        return prepared.pixel_values
    if prepared.images is None:
        raise DataError("the target takes images and the prepared set holds none: run `dvc repro` with onnx.preprocess")
    return prepared.images


def encode_images(encoder: Encoder, inputs: np.ndarray | Images, batch: int = BATCH) -> np.ndarray:
    """Encode every row in its order. Images are encoded in batches of one size."""
    groups = inputs.by_size() if isinstance(inputs, Images) else [list(range(len(inputs)))]
    parts = [group[rows] for group in groups for rows in batches(len(group), batch)]
    found = [
        encoder.encode_images(np.stack([inputs[row] for row in part]))
        for part in tqdm(parts, desc="encode images", disable=None)
    ]
    order = np.argsort(np.concatenate(parts))
    return np.concatenate(found).astype(np.float32)[order]


def encode_texts(encoder: Encoder, texts: Texts, batch: int = BATCH) -> np.ndarray:
    """Embeddings [texts, width] in float32, encoded in batches; [0, 1] where there are no texts."""
    if not len(texts):
        return np.empty((0, 1), dtype=np.float32)
    parts = [
        encoder.encode_texts(part.input_ids, part.attention_mask)
        for part in (texts[rows] for rows in batches(len(texts), batch))
    ]
    return np.concatenate(parts).astype(np.float32)


def save_embeddings(embeddings: Embeddings, path: Path) -> None:
    """Write them as .npz, which load_embeddings reads."""
    np.savez(path, images=embeddings.images, captions=embeddings.captions, prompts=embeddings.prompts)


def load_embeddings(path: Path) -> Embeddings:
    """What save_embeddings wrote: images, captions and prompts, each [rows, width] in float32.

    Raises DataError where there is no such file, as in the calibration set.
    """
    try:
        with np.load(path) as content:
            return Embeddings(content["images"], content["captions"], content["prompts"])
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: give the evaluation set, which `dvc repro prepare` makes") from error
