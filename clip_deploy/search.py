"""The images that a text describes best: of a folder, or of what `embed` made of one."""

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_deploy.classifier import ZeroShotClassifier
from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.embed import read_header
from clip_deploy.storage import list_images, list_parts, local, open_part, shown


class Hit(NamedTuple):
    cosine: float
    path: str


def search(classifier: ZeroShotClassifier, source: Path | str, text: str, top: int) -> list[Hit]:
    """The `top` images nearest to `text`, the nearest first.

    Args:
        source: a folder of images, a folder or URI of `embed`'s parts, or one part. Paths are relative to the images'
            folder.

    Raises:
        DataError: there is nothing to search, an image cannot be read, or the text is empty.
        DeployError: the parts were made by another package, whose embeddings mean something else.
    """
    if top < 1:
        raise DataError(f"top is {top}: give 1 or more")
    (wanted,) = classifier.embed_texts([text])
    best: list[Hit] = []
    for paths, embeddings in _parts(classifier, str(source)):
        cosines = embeddings @ wanted
        nearest = np.argsort(-cosines, kind="stable")[:top]
        hits = (Hit(float(cosines[row]), paths[row]) for row in nearest)
        best = heapq.nlargest(top, [*best, *hits], key=lambda hit: hit.cosine)
    return best


def _parts(classifier: ZeroShotClassifier, source: str) -> Iterator[tuple[list[str], np.ndarray]]:
    """Paths and float32 embeddings [images, dimension], one part in memory at a time."""
    folder = local(source)
    if folder and folder.is_file():
        yield _read(classifier, str(folder.parent), folder.name)
        return
    names = list_parts(source)
    for name in names:
        yield _read(classifier, source, name)
    if not names and folder:
        images = list_images(folder)
        yield images, classifier.embed_images([folder / name for name in images])
    elif not names:
        raise DataError(f"{shown(source)} holds none of `embed`'s parts: give a folder of images, or embed them")


def _read(classifier: ZeroShotClassifier, source: str, name: str) -> tuple[list[str], np.ndarray]:
    if read_header(source, name)["package"] != classifier.fingerprint:
        raise DeployError(
            f"{shown(source)}/{name} was made by another package: search with that one, or embed the images anew"
        )
    with open_part(source, name) as part:
        table = part.read().combine_chunks()
    rows = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return table.column("path").to_pylist(), rows.astype(np.float32).reshape(table.num_rows, -1)
