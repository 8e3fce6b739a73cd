"""Evaluation and calibration sets as the encoders take them, on disk: later stages need no tokenizer or image."""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from clip_deploy.core.errors import DataError
from clip_deploy.core.model import Model, as_images
from clip_deploy.core.parsing import plain, read_record
from clip_deploy.core.preprocessing import Preprocessing

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from clip_deploy.data.dataset import Dataset, Sample

CHUNK = 32  # images preprocessed at a time
CONTENTS = "manifest.json"
IMAGES = "images.zip"
SCORES = "scores.json"  # clip_deploy.builders.processor_files


@dataclass
class Texts:
    """Tokenised texts: two int64 arrays [texts, tokens]."""

    input_ids: np.ndarray
    attention_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice) -> "Texts":
        return Texts(self.input_ids[rows], self.attention_mask[rows])

    def padded(self, length: int, pad_token: int) -> "Texts":
        """The same texts with padding up to `length` tokens."""
        extra = ((0, 0), (0, length - self.input_ids.shape[1]))
        return Texts(
            np.pad(self.input_ids, extra, constant_values=pad_token),
            np.pad(self.attention_mask, extra),
        )


class Images:
    """The images before preprocessing, of whatever sizes: PNG files in an archive, decoded as needed."""

    def __init__(self, path: Path) -> None:
        from PIL import Image

        self.open = Image.open
        self.archive = zipfile.ZipFile(path)
        self.names = sorted(self.archive.namelist())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> np.ndarray:
        """One image, uint8 [height, width, 3], RGB."""
        with self.archive.open(self.names[row]) as file:
            return np.array(self.open(file))

    def by_size(self) -> list[list[int]]:
        """Rows of images of one size, group by group, the largest group first."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, name in enumerate(self.names):
            with self.archive.open(name) as file:
                groups.setdefault(self.open(file).size, []).append(row)
        return sorted(groups.values(), key=lambda rows: -len(rows))


@dataclass
class Contents:
    """manifest.json of a prepared set.

    Attributes:
        images, captions: how many.
        classes, templates: of its zero-shot question; empty where there is none.
        pad_token: what its texts are padded with.
        sha256: of each image's pixels.
    """

    images: int
    captions: int
    classes: list[str]
    templates: list[str]
    pad_token: int
    sha256: list[str]


@dataclass
class Prepared:
    """One set, ready to encode.

    Attributes:
        pixel_values: float32 [images, 3, height, width], or [images] records of patches (Model.image_dtype), read from
            disk as needed.
        images: the same before preprocessing, where they were kept for graphs that preprocess themselves.
        captions: Texts, with caption_image [captions] saying whose they are; empty where there are none.
        caption_text: [captions] the same number where two captions are the same words.
        prompts: every template with every class, class by class, or empty.
        labels: [images] index into classes, or empty.
    """

    pixel_values: np.ndarray
    captions: Texts
    caption_image: np.ndarray
    caption_text: np.ndarray
    prompts: Texts
    labels: np.ndarray
    contents: Contents
    images: Images | None = None

    @property
    def identity(self) -> str:
        """SHA-256 of what top-1 is counted on: images, labels, classes and templates."""
        counted = [self.contents.sha256, self.contents.classes, self.contents.templates, self.labels.tolist()]
        return hashlib.sha256(json.dumps(counted).encode()).hexdigest()

    def inputs(self, tower: str, text_inputs: list[str]) -> dict[str, np.ndarray]:
        """All rows of one tower's inputs, by their names in its graph."""
        if tower == "vision":
            fields = self.pixel_values.dtype.names
            return {name: self.pixel_values[name] for name in fields} if fields else {"pixel_values": self.pixel_values}
        return {name: getattr(self.texts, name) for name in text_inputs}

    @property
    def texts(self) -> Texts:
        """Captions, or the prompts where there are no captions: real texts to calibrate and to time with."""
        return self.captions if len(self.captions) else self.prompts


def write_prepared(
    name: str,
    dataset: "Dataset",
    templates: list[str],
    processor: "ProcessorMixin",
    model: Model,
    folder: Path,
    keep_images: bool = False,
) -> None:
    """Preprocess the set `name` ("evaluation" or "calibration") with the checkpoint's own processor into `folder`.

    With `keep_images`, the images themselves are written beside, without loss.
    """
    samples = getattr(dataset, name)
    if keep_images:
        _write_images(samples, folder / IMAGES)
    _write_pixels(samples, processor, model.image_dtype, folder / "pixel_values.npy")
    pairs = [(row, text) for row, sample in enumerate(samples) for text in sample.captions]
    distinct = {text: index for index, text in enumerate(dict.fromkeys(text for _, text in pairs))}
    captions = tokenize(processor, model, [text for _, text in pairs])
    prompts = tokenize(processor, model, [template.format(name) for name in dataset.classes for template in templates])
    np.savez(
        folder / "texts.npz",
        caption_ids=captions.input_ids,
        caption_mask=captions.attention_mask,
        caption_image=np.array([row for row, _ in pairs], dtype=np.int64),
        caption_text=np.array([distinct[text] for _, text in pairs], dtype=np.int64),
        prompt_ids=prompts.input_ids,
        prompt_mask=prompts.attention_mask,
        labels=np.array([dataset.classes.index(sample.label) for sample in samples if sample.label], dtype=np.int64),
    )
    contents = Contents(
        images=len(samples),
        captions=len(pairs),
        classes=dataset.classes,
        templates=templates if dataset.classes else [],
        pad_token=pad_token_of(processor),
        sha256=dataset.hashes[name],
    )
    (folder / CONTENTS).write_text(json.dumps(plain(contents), indent=1) + "\n")


def pad_token_of(processor: "ProcessorMixin") -> int:
    """What texts are padded with."""
    return int(processor.tokenizer.pad_token_id or 0)


def tokenize(processor: "ProcessorMixin", model: Model, texts: list[str]) -> Texts:
    """Pad to the longest text, or to the context where the model was trained so; longer texts are cut.

    Raises DataError where a text is no valid Unicode.
    """
    if not texts:
        empty = np.empty((0, 1), dtype=np.int64)
        return Texts(empty, empty)
    _check_unicode(texts)
    tokens = processor.tokenizer(
        texts,
        padding="max_length" if model.pad_to_context else "longest",
        truncation=True,
        max_length=model.context_length,
        return_attention_mask=True,
        return_tensors="np",
    )
    return Texts(tokens["input_ids"].astype(np.int64), tokens["attention_mask"].astype(np.int64))


def _check_unicode(texts: list[str]) -> None:
    for row, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"text {row + 1} of {len(texts)} is not valid Unicode: {text[:60]!r}") from error


def _write_pixels(samples: "list[Sample]", processor: "ProcessorMixin", dtype: np.dtype[Any], path: Path) -> None:
    descr = np.lib.format.dtype_to_descr(dtype.base)
    header = {"descr": descr, "fortran_order": False, "shape": (len(samples), *dtype.shape)}
    with path.open("wb") as file:  # not mapped into memory: where the disk fills up, that is killed by SIGBUS
        np.lib.format.write_array_header_1_0(file, header)
        for start in tqdm(range(0, len(samples), CHUNK), desc="preprocess", disable=None):
            images = [sample.open() for sample in samples[start : start + CHUNK]]
            file.write(as_images(processor.image_processor(images, return_tensors="np"), dtype).data)


def _write_images(samples: "list[Sample]", path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for row, sample in enumerate(tqdm(samples, desc="keep images", disable=None)):
            content = io.BytesIO()
            sample.open().convert("RGB").save(content, "png", icc_profile=None)
            archive.writestr(zipfile.ZipInfo(f"{row:06}.png"), content.getvalue())  # without a date: the same bytes


def load_prepared(folder: Path) -> Prepared:
    """Read one prepared set."""
    try:
        with np.load(folder / "texts.npz") as content:
            texts = dict(content)
        pixels = np.load(folder / "pixel_values.npy", mmap_mode="r")
    except OSError as error:
        raise DataError(f"{folder} is not a prepared set ({error}); run `dvc repro prepare`") from error
    return Prepared(
        pixel_values=pixels,
        captions=Texts(texts["caption_ids"], texts["caption_mask"]),
        caption_image=texts["caption_image"],
        caption_text=texts["caption_text"],
        prompts=Texts(texts["prompt_ids"], texts["prompt_mask"]),
        labels=texts["labels"],
        contents=read_record(Contents, folder / CONTENTS, "run `dvc repro prepare`"),
        images=Images(folder / IMAGES) if (folder / IMAGES).exists() else None,
    )


def grey_levels(images: np.ndarray, settings: Preprocessing | None) -> np.ndarray:
    """uint8 [images, height, width, 3] of what an image tower takes; without settings, that is it already."""
    if settings is None:
        return images
    levels = images.transpose(0, 2, 3, 1) * np.array(settings.image_std) + np.array(settings.image_mean)
    found: np.ndarray = (levels / settings.rescale_factor).round().clip(0, 255).astype(np.uint8)
    return found


def feeds(inputs: dict[str, np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows of `inputs`, `size` at a time."""
    for rows in batches(len(next(iter(inputs.values()))), size):
        yield {name: np.ascontiguousarray(array[rows]) for name, array in inputs.items()}


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of up to `size` rows that cover `count` rows in their order."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
