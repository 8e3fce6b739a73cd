"""A folder of images into Parquet files, part by part: what is killed goes on where it stopped.

Each part holds the embeddings of `part_size` files, in the order of their names, and appears whole or not at all. Its
metadata says which package and settings made it, and which files could not be read.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from tqdm import tqdm

from clip_deploy.classifier import ZeroShotClassifier
from clip_deploy.core.artifact import disk_errors
from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.images import SUFFIXES

MADE_BY = b"clip_deploy"  # key of a part's metadata
PART = "part-{:05}.parquet"
WAY_OUT = "give another output folder, or remove the files in this one"
WHAT = {"package": "another package", "files": "another list of files, or files of other sizes"}


@dataclass
class EmbedSettings:
    """How a folder is embedded; a run goes on only with the settings that it began with."""

    batch_size: int = 32
    part_size: int = 10_000  # images a part: what a kill costs at most
    float16: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "part_size"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}: give 1 or more")


@dataclass
class Summary:
    """What a run did. `unreadable` are lines of path and reason, of all parts; `seconds` are those of this run."""

    images: int
    embedded_before: int = 0
    embedded_now: int = 0
    seconds: float = 0.0
    unreadable: list[str] = field(default_factory=list)


def embed_folder(classifier: ZeroShotClassifier, folder: Path, output: Path, settings: EmbedSettings) -> Summary:
    """Embed all images under `folder` into `output`/part-00000.parquet and so on.

    A part has the columns path (relative to `folder`) and embedding (float32 or float16 [dimension], unit length).
    Parts that are there already are kept. Unreadable images are left out and named in the summary.

    Raises:
        DataError: the folder holds no image.
        DeployError: `output` holds parts of another package, other settings or another list of files, or cannot be
            written.
    """
    load_pyarrow()  # whatever is missing is said before the work
    files = list_images(folder)
    parts = [files[start : start + settings.part_size] for start in range(0, len(files), settings.part_size)]
    maker = _maker(classifier, folder, files, settings)
    done = {number: _read_header(output / PART.format(number), maker) for number in _present(output, len(parts))}
    summary = Summary(len(files), unreadable=[line for header in done.values() for line in header["unreadable"]])
    summary.embedded_before = sum(header["rows"] for header in done.values())
    started, dimension = monotonic(), classifier.manifest["dimension"]
    with tqdm(total=len(files), initial=sum(len(parts[number]) for number in done), desc="embed", disable=None) as bar:
        for number, names in enumerate(parts):
            if number not in done:
                made, unreadable = _embed_part(classifier, folder, names, settings, bar)
                _write_part(output / PART.format(number), made, dimension, maker | {"unreadable": unreadable}, settings)
                summary.embedded_now += len(made)
                summary.unreadable += unreadable
    summary.seconds = monotonic() - started
    return summary


def list_images(folder: Path) -> list[str]:
    """Paths of all image files under `folder`, relative to it, in one order on every machine."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give one with images")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = sorted((path.relative_to(folder).as_posix() for path in found), key=os.fsencode)
    if not names:
        raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return names


def _maker(classifier: ZeroShotClassifier, folder: Path, files: list[str], settings: EmbedSettings) -> dict[str, Any]:
    """What a part must have been made by to be kept."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(os.fsencode(name) + f"\0{(folder / name).stat().st_size}\0".encode())
    return {
        "package": classifier.fingerprint,
        "files": digest.hexdigest(),
        "batch_size": settings.batch_size,
        "part_size": settings.part_size,
        "float16": settings.float16,
    }


def _present(output: Path, count: int) -> list[int]:
    known = {PART.format(number): number for number in range(count)}
    present = sorted(path.name for path in output.glob("part-*.parquet"))
    if strange := [name for name in present if name not in known]:
        raise DeployError(f"{output / strange[0]} is not of this run, which has {count} parts: {WAY_OUT}")
    return [known[name] for name in present]


def _read_header(path: Path, maker: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a part. Raises DeployError where it was made by something else."""
    header = read_header(path)
    for key, value in maker.items():
        if header.get(key) != value:
            other = WHAT.get(key, f"{key} {header.get(key)}, and this run has {value}")
            raise DeployError(f"{path} was made with {other}: {WAY_OUT}")
    return header


def read_header(path: Path) -> dict[str, Any]:
    """What `embed` noted in a part, with its rows. Raises DeployError where the file is none of its parts."""
    _, parquet = load_pyarrow()
    try:
        metadata = parquet.read_metadata(path)
        return json.loads((metadata.metadata or {})[MADE_BY]) | {"rows": metadata.num_rows}
    except (OSError, ValueError, KeyError) as error:
        raise DeployError(f"{path} is no whole part of `embed`: {WAY_OUT}") from error


def _embed_part(
    classifier: ZeroShotClassifier, folder: Path, names: list[str], settings: EmbedSettings, bar: tqdm
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Embeddings by path, and a line for each file that cannot be read."""
    made: dict[str, np.ndarray] = {}
    unreadable: list[str] = []
    found = classifier.embed_each([folder / name for name in names], settings.batch_size)
    for name, embedding in zip(names, found, strict=True):
        bar.update()
        if isinstance(embedding, DataError):
            unreadable.append(_printable(str(embedding)))
        elif _printable(name) != name:
            unreadable.append(f"{_printable(name)} has a name that is no UTF-8: rename it")
        else:
            made[name] = embedding
    return made, unreadable


def _printable(text: str) -> str:
    """Bytes of a file's name that are no UTF-8 as question marks."""
    return text.encode("utf-8", "replace").decode()


def _write_part(
    path: Path, made: dict[str, np.ndarray], dimension: int, header: dict[str, Any], settings: EmbedSettings
) -> None:
    pyarrow, parquet = load_pyarrow()
    embeddings = np.stack(list(made.values())) if made else np.empty((0, dimension), dtype=np.float32)
    flat = pyarrow.array(embeddings.astype(np.float16 if settings.float16 else np.float32).reshape(-1))
    columns = {
        "path": pyarrow.array(list(made), pyarrow.string()),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, dimension),
    }
    table = pyarrow.table(columns, metadata={MADE_BY: json.dumps(header)})
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            parquet.write_table(table, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def load_pyarrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet, which nothing else in a deployment needs."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DeployError("Parquet needs pyarrow: pip install pyarrow") from error
    return pyarrow, parquet
