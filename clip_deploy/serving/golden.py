"""What is sent to a server to hold it against the package: images, texts and files; and what the package answers."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from clip_deploy.core.images import decode
from clip_deploy.core.package import DualEncoder, read_labels, read_preprocessing
from clip_deploy.core.preprocessing import Preprocessing
from clip_deploy.core.similarity import normalized
from clip_deploy.data.preprocessed import Prepared, batches, grey_levels
from clip_deploy.inference.encoders import PackageEncoder
from clip_deploy.inference.scores import Scoring
from clip_deploy.serving.job import stored

BATCH = 32  # images or texts in one call, at most
FILES = 32  # image files that the ensemble is asked about
MAX_LABELS = 64  # that it chooses among
ENLARGED = (3, 2)  # the files' width and height over the golden images': they are resized and cropped again
QUALITY = 95  # of the JPEG files
DARK = 0.35  # of the light: a camera whose pictures have become dark, the drift that must be found
TEXTS = ("input_ids", "attention_mask")


def golden_inputs(package: Path, prepared: Prepared) -> dict[str, np.ndarray]:
    """Batches as images_0, images_1..., the second half of them darkened as moved_0..., texts as input_ids_0...

    Besides, files: uint8 [files, bytes], padded, with their lengths; and, where the data have classes, labels with
    their label_input_ids and label_attention_mask.
    """
    settings = read_preprocessing(package)
    size = min(BATCH, len(prepared.pixel_values))
    groups = image_batches(prepared, settings, size)
    inputs = {f"images_{row}": group for row, group in enumerate(groups)}
    inputs |= {f"moved_{row}": darkened(group, settings) for row, group in enumerate(groups[len(groups) // 2 :])}
    texts = distinct_rows(*(getattr(prepared.texts, name) for name in TEXTS))
    for row, rows in enumerate(batches(len(texts), BATCH)):
        inputs |= {f"{name}_{row}": getattr(prepared.texts, name)[texts[rows]] for name in TEXTS}
    return inputs | file_inputs(groups[0], settings) | label_inputs(package, prepared)


def distinct_rows(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The first row of each text: one that comes again is answered from the server's cache, and changes its batch."""
    _, first = np.unique(np.concatenate([ids, mask], axis=1), axis=0, return_index=True)
    return np.sort(first)


def image_batches(prepared: Prepared, settings: Preprocessing | None, size: int) -> list[np.ndarray]:
    """Golden images as the tower takes them, in batches of one size."""
    images = prepared.images
    if settings is not None or images is None:
        return [np.ascontiguousarray(prepared.pixel_values[rows]) for rows in batches(len(prepared.pixel_values), size)]
    groups = [group[rows] for group in images.by_size() for rows in batches(len(group), size)]
    return [np.stack([images[row] for row in group]) for group in groups]


def darkened(images: np.ndarray, settings: Preprocessing | None) -> np.ndarray:
    """The images with a share DARK of their light, as a camera that failed would send them.

    Args:
        images: what the image tower takes: uint8 [batch, height, width, 3], or pixel_values [batch, 3, height, width].
        settings: how pixel_values are made of grey levels; None for uint8.
    """
    levels = (grey_levels(images, settings) * DARK).astype(np.uint8)
    if settings is None:
        return levels
    light = levels * settings.rescale_factor - np.array(settings.image_mean)
    found: np.ndarray = (light / np.array(settings.image_std)).astype(np.float32).transpose(0, 3, 1, 2).copy()
    return found


def file_inputs(images: np.ndarray, settings: Preprocessing | None) -> dict[str, np.ndarray]:
    """The first FILES images as JPEG files, padded with zeros: `files` uint8 [files, bytes] and their `lengths`."""
    files = [jpeg(levels) for levels in grey_levels(images[:FILES], settings)]
    lengths = np.array([len(file) for file in files])
    padded = np.zeros((len(files), lengths.max()), dtype=np.uint8)
    for row, file in enumerate(files):
        padded[row, : len(file)] = np.frombuffer(file, dtype=np.uint8)
    return {"files": padded, "lengths": lengths}


def jpeg(levels: np.ndarray) -> bytes:
    """A JPEG file of the image, enlarged out of shape."""
    image, content = Image.fromarray(levels), io.BytesIO()
    size = (image.width * ENLARGED[0], image.height * ENLARGED[1])
    image.resize(size, Image.Resampling.BICUBIC).save(content, "jpeg", quality=QUALITY)
    return content.getvalue()


def label_inputs(package: Path, prepared: Prepared) -> dict[str, np.ndarray]:
    """The first classes in the first template, and their tokens, which prepared.prompts holds class by class."""
    found = read_labels(package)
    if not found.classes:
        return {}
    names, step = found.classes[:MAX_LABELS], len(found.templates)
    rows = slice(0, len(names) * step, step)
    return {
        "labels": np.array([found.templates[0].format(name) for name in names]),
        **{f"label_{name}": getattr(prepared.prompts, name)[rows] for name in TEXTS},
    }


def encode_offline(
    package: Path, encoder: DualEncoder, inputs: dict[str, np.ndarray], threads: int
) -> dict[str, np.ndarray]:
    """images, texts and probabilities as the package itself gives them in this process, on the CPU."""
    towers = PackageEncoder(package, encoder, "cpu", threads)
    texts = zip(*(stored(inputs, name) for name in TEXTS), strict=True)
    found = {
        "images": np.concatenate([towers.encode_images(batch) for batch in stored(inputs, "images")]),
        "texts": np.concatenate([towers.encode_texts(*pair) for pair in texts]),
    }
    if "labels" in inputs:
        labels = towers.encode_texts(*(inputs[f"label_{name}"] for name in TEXTS))
        images = [towers.encode_images(each) for each in preprocessed(inputs, read_preprocessing(package))]
        found["probabilities"] = probabilities(np.concatenate(images), labels, encoder)
    return found


def preprocessed(inputs: dict[str, np.ndarray], settings: Preprocessing | None) -> list[np.ndarray]:
    """Each file by itself, as the tower takes it, by what opens packages without a server."""
    files = [row[:length].tobytes() for row, length in zip(inputs["files"], inputs["lengths"], strict=True)]
    decoded = [decode(file, f"file {row}") for row, file in enumerate(files)]
    return [(np.asarray(image) if settings is None else settings(image))[None] for image in decoded]


def probabilities(images: np.ndarray, texts: np.ndarray, encoder: DualEncoder) -> np.ndarray:
    """float [images, texts], as the model scores pairs."""
    scoring = Scoring(encoder.logit_scale, encoder.logit_bias, encoder.activation)
    return scoring.probabilities(normalized(images) @ normalized(texts).T)
