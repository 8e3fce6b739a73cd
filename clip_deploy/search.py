"""The images that a text describes best: of a folder, or of what `embed` made of one."""

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_deploy.classifier import ZeroShotClassifier
from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.embed import list_images, load_pyarrow, read_header


class Hit(NamedTuple):
    cosine: float
    path: str


def search(classifier: ZeroShotClassifier, source: Path, text: str, top: int) -> list[Hit]:
    """The `top` images nearest to `text`, the nearest first.

    Args:
        source: a folder of images, a folder of `embed`'s parts, or one part. Paths are relative to the images' folder.

    Raises:
        DataError: there is nothing to search, an image cannot be read, or the text is empty.
        DeployError: the parts were made by another package, whose embeddings mean something else.
    """
    if top < 1:
        raise DataError(f"top is {top}: give 1 or more")
    (wanted,) = classifier.embed_texts([text])
    best: list[Hit] = []
    for paths, embeddings in _parts(classifier, source):
        cosines = embeddings @ wanted
        nearest = np.argsort(-cosines, kind="stable")[:top]
        hits = (Hit(float(cosines[row]), paths[row]) for row in nearest)
        best = heapq.nlargest(top, [*best, *hits], key=lambda hit: hit.cosine)
    return best


def _parts(classifier: ZeroShotClassifier, source: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """Paths and float32 embeddings [images, dimension], one part in memory at a time."""
    files = [source] if source.is_file() else sorted(source.glob("part-*.parquet"))
    if not files:
        names = list_images(source)
        yield names, classifier.embed_images([source / name for name in names])
        return
    for file in files:
        yield _read(classifier, file)


def _read(classifier: ZeroShotClassifier, file: Path) -> tuple[list[str], np.ndarray]:
    if read_header(file)["package"] != classifier.fingerprint:
        raise DeployError(f"{file} was made by another package: search with that one, or embed the images anew")
    _, parquet = load_pyarrow()
    table = parquet.read_table(file).combine_chunks()
    rows = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return table.column("path").to_pylist(), rows.astype(np.float32).reshape(table.num_rows, -1)
