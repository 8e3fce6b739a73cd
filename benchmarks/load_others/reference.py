"""The checkpoint's own vectors of texts and image files, by transformers, each alone: what a server of it owes."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from clip_deploy.core.model import embeddings
from clip_deploy.core.vectors import unit
from clip_deploy.data import scenes
from clip_deploy.web.questions import FILES, IN_EACH, LARGE, MIN_COSINE, OWN, distinct, made_up_texts, saved

PICTURES = 24
TEXTS = 2_000
WORDS = [*scenes.COLOURS, *scenes.SHAPES, *scenes.SIZES, "a", "an", "above", "image", "left", "of", "photo", "right"]
PROJECTIONS = ("text_projection.weight", "visual_projection.weight")


@dataclass(frozen=True)
class Reference:
    """What is asked for, and the vectors that are due.

    Attributes:
        texts: none beyond the context; no two have vectors as close as `min_cosine`.
        text_vectors: [texts, dimension].
        tokens: of each text, those at its beginning and end included.
        files: image files by kind; vectors: theirs, [files, dimension].
        min_cosine: below it a vector is wrong.
    """

    texts: list[str]
    text_vectors: np.ndarray
    tokens: list[int]
    files: dict[str, list[bytes]]
    vectors: dict[str, np.ndarray]
    min_cosine: float = MIN_COSINE

    @property
    def own(self) -> list[bytes]:
        return self.files[OWN]


def pictures() -> list[Image.Image]:
    return [scenes.render("load", row, row % len(scenes.CLASSES))[0] for row in range(PICTURES)]


def texts(number: int = TEXTS) -> list[str]:
    return made_up_texts(WORDS, number)


def of_checkpoint(folder: Path, opened: Callable[[Image.Image], Image.Image], number: int = TEXTS) -> Reference:
    """Of a checkpoint of transformers.

    Args:
        opened: an image as the server hands it to the checkpoint's processor, for which there is more than one right
            way: `dropped` or `upright`.
    """
    embed = Embed(folder, opened)
    found = [text for text in texts(number) if embed.length(text) <= embed.context]
    vectors = unit(np.stack([embed.text(text) for text in found]))
    kept = distinct(vectors, MIN_COSINE)
    files = image_files()
    return Reference(
        [found[row] for row in kept],
        vectors[kept],
        [embed.length(found[row]) for row in kept],
        files,
        {kind: unit(np.stack([embed.image(file) for file in group])) for kind, group in files.items()},
    )


def dropped(image: Image.Image) -> Image.Image:
    """As transformers 4 reads it: without its transparency, and not turned."""
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; transformers 5 makes white of what is transparent."""
    return ImageOps.exif_transpose(image)


def image_files() -> dict[str, list[bytes]]:
    """By kind, as `clip-deploy serve` is asked for them."""
    drawn = pictures()
    files = {
        kind: [write(picture) for picture in drawn[: LARGE if kind == "large" else IN_EACH]]
        for kind, write in FILES.items()
    }
    return files | {OWN: [saved(picture, "JPEG", quality=90) for picture in drawn]}


class Embed:
    """One text or image after the other."""

    def __init__(self, folder: Path, opened: Callable[[Image.Image], Image.Image]) -> None:
        self.model: Any = AutoModel.from_pretrained(folder).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.context, self.opened = self.processor.tokenizer.model_max_length, opened

    def length(self, text: str) -> int:
        return len(self.processor.tokenizer(text, verbose=False)["input_ids"])

    def text(self, text: str) -> np.ndarray:
        return self._embedded("get_text_features", self.processor(text=[text], return_tensors="pt", truncation=True))

    def image(self, file: bytes) -> np.ndarray:
        image = self.opened(Image.open(io.BytesIO(file)))
        return self._embedded("get_image_features", self.processor(images=[image], return_tensors="pt"))

    def _embedded(self, method: str, inputs: Any) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = embeddings(self.model, method, **inputs).numpy()[0]
        return found


def widened(checkpoint: Path, folder: Path) -> Path:
    """A copy of a CLIP whose projections are filled up with zeros to its text tower's width: its cosines stay.

    vLLM takes no CLIP whose text tower is wider than its embeddings, and reads their width from text_config.
    """
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    width = config["text_config"]["hidden_size"]
    for part in (config, config["text_config"], config["vision_config"]):
        part["projection_dim"] = width
    weights = load_file(folder / "model.safetensors")
    for name in PROJECTIONS:
        rows = weights[name]
        weights[name] = torch.cat([rows, rows.new_zeros(width - len(rows), rows.shape[1])])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
