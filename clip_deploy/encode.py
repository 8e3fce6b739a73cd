"""Run an encoder over a prepared set, and keep the embeddings."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clip_deploy.prepared import Prepared, Texts, batches
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
    return Embeddings(
        images=encode_images(encoder, prepared.pixel_values),
        captions=encode_texts(encoder, prepared.captions),
        prompts=encode_texts(encoder, prepared.prompts),
    )


def encode_images(encoder: Encoder, pixel_values: np.ndarray, batch: int = BATCH) -> np.ndarray:
    parts = [
        encoder.encode_images(np.array(pixel_values[rows]))
        for rows in tqdm(list(batches(len(pixel_values), batch)), desc="encode images", disable=None)
    ]
    return np.concatenate(parts).astype(np.float32)


def encode_texts(encoder: Encoder, texts: Texts, batch: int = BATCH) -> np.ndarray:
    if not len(texts):
        return np.empty((0, 1), dtype=np.float32)
    parts = [
        encoder.encode_texts(part.input_ids, part.attention_mask)
        for part in (texts[rows] for rows in batches(len(texts), batch))
    ]
    return np.concatenate(parts).astype(np.float32)


def save_embeddings(embeddings: Embeddings, path: Path) -> None:
    np.savez(path, images=embeddings.images, captions=embeddings.captions, prompts=embeddings.prompts)


def load_embeddings(path: Path) -> Embeddings:
    content = np.load(path)
    return Embeddings(content["images"], content["captions"], content["prompts"])
