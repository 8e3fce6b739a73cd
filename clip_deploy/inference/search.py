"""The images that a text describes best: of a folder, of what `embed` made of one, or of an index of that."""

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.core.vectors import cut
from clip_deploy.inference.classifier import ZeroShotClassifier, check_count
from clip_deploy.inference.embed import printable, read_header, read_part
from clip_deploy.inference.index import is_index, search_index
from clip_deploy.inference.storage import TABLE, list_images, list_parts, local, shown

SEARCHED = "give a folder of images, or what `embed` (a folder or URI of part-*.parquet, or one part) or `index` wrote"
Embedded = tuple[list[str], np.ndarray]  # paths, and float32 embeddings [images, dimension]


class Hit(NamedTuple):
    """An image that was found: the cosine of its embedding with the text's, -1 to 1, and its path."""

    cosine: float
    path: str


class Found(NamedTuple):
    """The nearest first; and a line for each image that cannot be read."""

    hits: list[Hit]
    unreadable: list[str]


def search(classifier: ZeroShotClassifier, source: Path | str, text: str, top: int) -> Found:
    """The `top` images nearest to `text`. What cannot be read is left out and named.

    FAISS searches an index (index.search_index); all else is searched whole. Of parts with fewer dimensions the text is
    cut like the images; of binary ones a cosine is that of the signs.

    Args:
        source: a folder of images, a folder or URI of `embed`'s parts, one part, or an index of parts. Paths are
            relative to the images' folder.

    Raises:
        DataError: there is nothing to search, `top` is below 1, or the text is empty.
        DeployError: the parts were made by another package, whose embeddings mean something else, or an index is
            damaged.
    """
    check_count("top", top)
    (wanted,) = classifier.embed_texts([text])
    if (folder := local(str(source))) and is_index(folder):
        return Found([Hit(*each) for each in search_index(folder, classifier.fingerprint, wanted, top)], [])
    best: list[Hit] = []
    unreadable: list[str] = []
    for paths, embeddings in _parts(classifier, str(source), unreadable):
        cosines = embeddings @ cut(wanted, embeddings.shape[1])
        nearest = np.argsort(-cosines, kind="stable")[:top]
        hits = (Hit(float(cosines[row]), paths[row]) for row in nearest)
        best = heapq.nlargest(top, [*best, *hits], key=lambda hit: hit.cosine)
    return Found(best, unreadable)


def _parts(classifier: ZeroShotClassifier, source: str, unreadable: list[str]) -> Iterator[Embedded]:
    """One part in memory at a time."""
    folder = local(source)
    if folder and not folder.exists():
        raise DataError(f"{source} does not exist: {SEARCHED}")
    if folder and folder.is_file():
        if folder.suffix != TABLE:
            raise DataError(f"{source} is a file: {SEARCHED}")
        yield _read(classifier, str(folder.parent), folder.name)
        return
    names = list_parts(source)
    for name in names:
        yield _read(classifier, source, name)
    if not names and folder:
        yield _embed(classifier, folder, unreadable)
    elif not names:
        raise DataError(f"{shown(source)} holds none of `embed`'s parts: {SEARCHED}")


def _embed(classifier: ZeroShotClassifier, folder: Path, unreadable: list[str]) -> Embedded:
    listing = list_images(folder)
    images = list(listing.files)
    unreadable += listing.skipped.values()
    found = classifier.embed_each(folder / name for name in images)
    paths: list[str] = []
    embeddings: list[np.ndarray] = []
    for name, embedding in zip(images, tqdm(found, "embed images", len(images), disable=None), strict=True):
        if isinstance(embedding, DataError):
            unreadable.append(printable(str(embedding)))
        else:
            paths.append(printable(name))
            embeddings.append(embedding)
    return paths, np.array(embeddings, np.float32).reshape(-1, classifier.dimension)


def _read(classifier: ZeroShotClassifier, source: str, name: str) -> Embedded:
    header = read_header(source, name, SEARCHED)
    if header["package"] != classifier.fingerprint:
        raise DeployError(
            f"{shown(source)}/{name} was made by another package: search with that one, or embed the images again"
        )
    if "dimensions" not in header:
        raise DeployError(
            f"{shown(source)}/{name} was made with an earlier version of clip-deploy: embed the images again"
        )
    return read_part(source, name, header["dimensions"])
