"""Where evaluation and calibration samples come from. The two sets never share an image, by content hash."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from clip_deploy.core.config import DataConfig
from clip_deploy.core.environment import cores, located
from clip_deploy.core.errors import ConfigError, DataError, first_line, listed
from clip_deploy.core.image_files import class_files
from clip_deploy.core.images import decode, read_image
from clip_deploy.data import scenes


@dataclass(frozen=True)
class Sample:
    """One image, opened when needed, with what is known of it."""

    open: Callable[[], Image.Image]
    captions: tuple[str, ...] = ()
    label: str | None = None


@dataclass
class Dataset:
    """Evaluation and calibration samples, disjoint; classes are empty where the source has no labels."""

    evaluation: list[Sample]
    calibration: list[Sample]
    classes: list[str]
    hashes: dict[str, list[str]] = field(default_factory=dict)  # SHA-256 of each image's pixels, by set


SPLITS = {"dev", "eval", "test", "testing", "train", "training", "val", "valid", "validation"}  # names of no class


def check_prompts(data: DataConfig) -> None:
    """Raises ConfigError where there will be classes, and no prompt for them."""
    if (data.source in ("shapes", "image-folder") or data.label_column) and not data.templates:
        raise ConfigError(
            "data.templates is empty: give at least one prompt for the classes, for example ['a photo of a {}']"
        )


def load(data: DataConfig, seed: int) -> Dataset:
    """Draw both sets from the configured source.

    Raises DataError where images are missing or unreadable, where a folder has no classes, or too few are left.
    """
    if data.source == "shapes":
        dataset = _shapes(data)
    else:
        source = {"image-folder": _image_folder, "captions": _captions, "hub": _hub}[data.source]
        samples, classes = source(data)
        dataset = _split(samples, classes, data, seed)
    shared = set(dataset.hashes["evaluation"]) & set(dataset.hashes["calibration"])
    if shared:
        raise DataError(
            f"{len(shared)} images are in both the evaluation and the calibration set: remove them from one"
        )
    return dataset


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of the decoded RGB pixels and their size: the same picture in another file is the same picture."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()


def _shapes(data: DataConfig) -> Dataset:
    sets, hashes = {}, {}
    for name, count in (("evaluation", data.evaluation_samples), ("calibration", data.calibration_samples)):
        rendered = [scenes.render(name, index, index % len(scenes.CLASSES)) for index in range(count)]
        sets[name] = [Sample(image.copy, (scene.caption,), scene.label) for image, scene in rendered]
        hashes[name] = [pixel_hash(image) for image, _ in rendered]
    return Dataset(sets["evaluation"], sets["calibration"], list(scenes.CLASSES), hashes)


def _split(samples: list[Sample], classes: list[str], data: DataConfig, seed: int) -> Dataset:
    """Shuffle, drop pictures seen before, and give calibration its share, at most a quarter."""
    order = np.random.default_rng(seed).permutation(len(samples))
    wanted = data.evaluation_samples + data.calibration_samples
    try:
        unique = list(_unique((samples[index] for index in order), wanted))
    except DataError as error:
        raise _unreadable(samples) from error
    aside = min(data.calibration_samples, len(unique) // 4)
    if aside < 1 or len(unique) - aside < 8:
        raise DataError(
            f"data.source {data.source} yields {len(unique)} different images: at least 10 are needed, 8 to evaluate "
            "with and 2 to calibrate with"
        )
    if len(classes) == 1:
        raise DataError(
            f"data.source {data.source} has one class, {classes[0]!r}, and zero-shot answers need two: give the folder "
            "that holds the folders of all classes, or set label_column to null"
        )
    keep = unique[aside : aside + data.evaluation_samples]
    return Dataset(
        evaluation=[sample for sample, _ in keep],
        calibration=[sample for sample, _ in unique[:aside]],
        classes=classes,
        hashes={"evaluation": [digest for _, digest in keep], "calibration": [digest for _, digest in unique[:aside]]},
    )


def _unique(samples: Iterable[Sample], wanted: int) -> Iterator[tuple[Sample, str]]:
    seen: set[str] = set()
    with tqdm(total=wanted, desc="read images", disable=None) as progress:
        for sample in samples:
            digest = pixel_hash(sample.open())
            if digest not in seen:
                seen.add(digest)
                progress.update()
                yield sample, digest
            if len(seen) == wanted:
                return


def _unreadable(samples: list[Sample]) -> DataError:
    """Name all images that cannot be read, whether they were drawn or not: a user mends them at once."""
    with ThreadPoolExecutor(cores()) as pool:
        faults = list(tqdm(pool.map(_fault, samples), "read all images", len(samples), disable=None))
    found = [fault for fault in faults if fault]
    return DataError(f"{len(found):,} of {len(samples):,} images cannot be read: {listed(found)}")


def _fault(sample: Sample) -> str | None:
    try:
        sample.open()
    except DataError as error:
        return str(error)
    return None


def _image_folder(data: DataConfig) -> tuple[list[Sample], list[str]]:
    root = _existing(data, Path.is_dir, "folder")
    files = _by_class(root)
    names = [name for names in files.values() for name in names]
    if names and set(map(str.lower, files)) <= SPLITS and all(name.count("/") > 1 for name in names):
        raise DataError(
            f"{root} holds {' and '.join(sorted(files))}, in which are sub-folders alone: give the one of them whose "
            f"sub-folders are the classes, for example path={root / min(files)}"
        )
    if empty := [str(root / name) for name, names in files.items() if not names]:
        raise DataError(f"{listed(empty)} holds no images: fill it or remove it")
    classes = {name: name.replace("_", " ") for name in files}
    samples = [
        Sample(partial(read_image, root / name), label=classes[folder]) for folder in files for name in files[folder]
    ]
    return samples, list(classes.values())


def _by_class(root: Path) -> dict[str, list[str]]:
    """Paths of images below `root`, by the folder of their class."""
    found = class_files(root)
    if found.skipped:
        raise DataError(f"{root} cannot be read whole: {listed(list(found.skipped.values()))}")
    folders = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise DataError(f"{root} has no classes: put the images of each class into a sub-folder named as the class")
    files: dict[str, list[str]] = {folder: [] for folder in folders}
    for name in sorted(found.files, key=lambda name: name.split("/")):
        files[name.split("/")[0]].append(name)
    return files


def _captions(data: DataConfig) -> tuple[list[Sample], list[str]]:
    table = _existing(data, Path.is_file, "CSV file")
    try:
        rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:  # pandas' parser errors and UnicodeDecodeError are ValueErrors
        raise DataError(f"{table} is not a CSV file with a header: {error}") from error
    _check_columns(str(table), data, list(rows.columns))
    captions: dict[Path, list[str]] = {}
    labels: dict[Path, str | None] = {}
    for row in rows.to_dict("records"):
        path = table.parent / row[data.image_column]
        labels[path] = row[data.label_column] if data.label_column else None
        captions.setdefault(path, [])
        if data.label_column and not labels[path]:
            raise DataError(
                f"{table}: {row[data.image_column]} has no {data.label_column}: fill it or drop label_column"
            )
        if data.caption_column:
            captions[path].append(row[data.caption_column])
    if missing := [str(path) for path in captions if not path.is_file()]:
        raise DataError(f"{table}: {len(missing):,} of {len(captions):,} images do not exist: {listed(missing)}")
    samples = [Sample(partial(read_image, path), tuple(captions[path]), labels[path]) for path in captions]
    return samples, sorted({label for label in labels.values() if label})


def _hub(data: DataConfig) -> tuple[list[Sample], list[str]]:
    """A dataset of the Hugging Face hub, or a local folder in one of its layouts, through `datasets`."""
    from datasets import ClassLabel, Image, load_dataset

    what = f"data.dataset_id {data.dataset_id}"
    try:
        local = located(str(data.dataset_id))
        name = str(local) if local.is_dir() else data.dataset_id
        table = load_dataset(name, revision=data.revision, split=data.split)
    except (OSError, ValueError, RuntimeError) as error:
        line = first_line(error)
        raise DataError(
            f"{what}, split {data.split!r} cannot be loaded: {line}; check the id, split and network"
        ) from error
    _check_columns(what, data, table.column_names)
    if not isinstance(table.features[data.image_column], Image):
        raise DataError(f"{what}: column {data.image_column!r} holds no images but {table.features[data.image_column]}")
    images = table.select_columns(data.image_column).cast_column(data.image_column, Image(decode=False))
    captions = table[data.caption_column] if data.caption_column else [()] * len(table)
    labels = table[data.label_column] if data.label_column else [None] * len(table)
    feature = table.features[data.label_column] if data.label_column else None
    named = feature.int2str if isinstance(feature, ClassLabel) else str
    samples = [
        Sample(
            partial(_hub_image, images, index, data.image_column),
            tuple(_as_list(caption)),
            named(label).replace("_", " ") if data.label_column else None,
        )
        for index, (caption, label) in enumerate(zip(captions, labels, strict=True))
    ]
    return samples, sorted({sample.label for sample in samples if sample.label})


def _check_columns(what: str, data: DataConfig, present: list[str]) -> None:
    for column in (data.image_column, data.caption_column, data.label_column):
        if column and column not in present:
            raise DataError(f"{what} has no column {column!r}: it has {', '.join(present) or 'none'}")


def _as_list(captions: str | Iterable[str]) -> Iterable[str]:
    return [captions] if isinstance(captions, str) else captions


def _hub_image(table: Any, index: int, column: str) -> Image.Image:
    """Not decoded by `datasets`, whose errors name no row."""
    image, name = table[index][column], f"the image in row {index}"
    if image is None:
        raise DataError(f"{name} is missing: fill it or remove the row")
    if image["bytes"] is None:
        return read_image(Path(image["path"]))
    return decode(image["bytes"], f"{name} ({image['path']})" if image["path"] else name)


def _existing(data: DataConfig, test: Callable[[Path], bool], kind: str) -> Path:
    path = located(str(data.path))
    if not test(path):
        raise DataError(f"data.path is {data.path}: no such {kind}")
    return path
