"""Images into Parquet files, part by part: what is killed goes on where it stopped.

Each part holds the embeddings of `part_size` images, in the order of their names, and appears whole or not at all. Its
metadata says which package and settings made it, and which images could not be read.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import tee
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from clip_deploy.classifier import ZeroShotClassifier, check_count
from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.storage import (
    Part,
    Source,
    list_parts,
    load_pyarrow,
    open_part,
    open_source,
    remove_partial,
    shown,
    write_part,
)

MADE_BY = b"clip_deploy"  # key of a part's metadata
PART = "part-{:05}.parquet"
WAY_OUT = "give another output folder, or remove the files in this one"
WHAT = {"package": "another package", "files": "another list of files, or files that were changed since"}


@dataclass
class EmbedSettings:
    """How images are embedded; a run goes on only with the settings that it began with."""

    batch_size: int = 32
    part_size: int = 10_000  # images a part: what a kill costs at most
    float16: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "part_size"):
            check_count(name, getattr(self, name))


@dataclass
class Summary:
    """What a run did. `unreadable` are lines of path and reason, of all parts; `seconds` are those of this run."""

    images: int
    embedded_before: int = 0
    embedded_now: int = 0
    seconds: float = 0.0
    unreadable: list[str] = field(default_factory=list)


@dataclass
class Job:
    """What every part of a run is made with, on whatever machine.

    Attributes:
        output: the parts' folder, or its URI.
        maker: what a part must have been made by to be kept; it goes into its metadata.
        dimension: of an embedding.
    """

    output: str
    maker: dict[str, Any]
    dimension: int
    settings: EmbedSettings


class Package(Protocol):
    """A package that is open, or will be on other machines."""

    manifest: dict[str, Any]
    fingerprint: str


Header = dict[str, Any]  # a part's metadata, with its `rows`
Make = Callable[[Job, dict[int, Part], Callable[[int], object]], Iterable[Header]]


def embed_folder(classifier: ZeroShotClassifier, folder: Path, output: Path, settings: EmbedSettings) -> Summary:
    """Embed all images under `folder` into `output`/part-00000.parquet and so on, as `embed` does."""
    source = open_source(str(folder), settings.part_size)
    return embed(classifier, source, str(output), settings, partial(make_here, classifier))


def embed(package: Package, source: Source, output: str, settings: EmbedSettings, make: Make) -> Summary:
    """Embed all images of a source into `output`/part-00000.parquet and so on.

    A part has the columns path (relative to the folder; of a table the id) and embedding (float32 or float16
    [dimension], unit length). Parts that are there already are kept. Unreadable images are left out and named in the
    summary.

    Args:
        output: a folder, or a URI as `open_source` takes it.
        make: makes the parts that are missing, on this machine (`make_here`) or on others.

    Raises:
        DeployError: `output` holds parts of another package, other settings or another list of files, or cannot be
            written.
    """
    remove_partial(output)
    job = Job(output, _maker(package, source, settings), package.manifest["dimension"], settings)
    done = {number: check_header(job, number) for number in _present(output, len(source.parts))}
    missing = {number: part for number, part in enumerate(source.parts) if number not in done}
    summary = Summary(source.images, unreadable=[line for header in done.values() for line in header["unreadable"]])
    summary.embedded_before = sum(header["rows"] for header in done.values())
    started, before = monotonic(), source.images - sum(map(len, missing.values()))
    with tqdm(total=source.images, initial=before, desc="embed", disable=None) as bar:
        for header in make(job, missing, bar.update):
            summary.embedded_now += header["rows"]
            summary.unreadable += header["unreadable"]
    summary.seconds = monotonic() - started
    remove_partial(output)
    if lost := len(source.parts) - len(_present(output, len(source.parts))):
        raise DeployError(f"{shown(output)} lacks {lost} parts that were written: look at the storage, and run again")
    return summary


def _maker(package: Package, source: Source, settings: EmbedSettings) -> dict[str, Any]:
    return {
        "package": package.fingerprint,
        "files": source.digest,
        "batch_size": settings.batch_size,
        "part_size": settings.part_size,
        "float16": settings.float16,
    }


def _present(output: str, count: int) -> list[int]:
    known = {PART.format(number): number for number in range(count)}
    present = list_parts(output)
    if strange := [name for name in present if name not in known]:
        raise DeployError(f"{shown(output)}/{strange[0]} is not of this run, which has {count} parts: {WAY_OUT}")
    return [known[name] for name in present]


def check_header(job: Job, number: int) -> Header:
    """Metadata of a part that is there. Raises DeployError where it was made by something else."""
    name = PART.format(number)
    header = read_header(job.output, name)
    for key, value in job.maker.items():
        if header.get(key) != value:
            other = WHAT.get(key, f"{key} {header.get(key)}, and this run has {value}")
            raise DeployError(f"{shown(job.output)}/{name} was made with {other}: {WAY_OUT}")
    return header


def read_header(output: str, name: str) -> Header:
    """What `embed` noted in a part, with its rows. Raises DeployError where the file is none of its parts."""
    try:
        with open_part(output, name) as part:
            return json.loads((part.metadata.metadata or {})[MADE_BY]) | {"rows": part.metadata.num_rows}
    except (OSError, ValueError, KeyError) as error:
        raise DeployError(f"{shown(output)}/{name} is no whole part of `embed`: {WAY_OUT}") from error


def make_here(
    classifier: ZeroShotClassifier, job: Job, missing: dict[int, Part], advance: Callable[[int], object]
) -> Iterator[Header]:
    for number, part in missing.items():
        yield make_part(classifier, job, number, part, advance)


def make_part(
    classifier: ZeroShotClassifier, job: Job, number: int, part: Part, advance: Callable[[int], object]
) -> Header:
    """Embed and write one part; `advance` is told how many images are done. The same part has the same bytes.

    Raises DeployError where storage fails: the part is not written then.
    """
    made, unreadable = _embed_part(classifier, part, job.settings, advance)
    header = job.maker | {"unreadable": unreadable}
    write_part(job.output, PART.format(number), _table(made, header, job))
    return header | {"rows": len(made)}


def _embed_part(
    classifier: ZeroShotClassifier, part: Part, settings: EmbedSettings, advance: Callable[[int], object]
) -> tuple[list[tuple[str, np.ndarray]], list[str]]:
    """Names with their embeddings, and a line for each image that cannot be read."""
    made: list[tuple[str, np.ndarray]] = []
    unreadable: list[str] = []
    named, read = tee(part.pictures())
    found = classifier.embed_each((picture for _, picture in read), settings.batch_size)
    for (name, _), embedding in zip(named, found, strict=True):
        advance(1)
        if isinstance(embedding, DataError):
            unreadable.append(printable(str(embedding)))
        elif printable(name) != name:
            unreadable.append(f"{printable(name)} has a name that is no UTF-8: rename it")
        else:
            made.append((name, embedding))
    return made, unreadable


def printable(text: str) -> str:
    """Bytes of a file's name that are no UTF-8 as question marks."""
    return text.encode("utf-8", "replace").decode()


def _table(made: list[tuple[str, np.ndarray]], header: Header, job: Job) -> Any:
    pyarrow, _ = load_pyarrow()
    embeddings = np.array([embedding for _, embedding in made], dtype=np.float32).reshape(-1, job.dimension)
    flat = pyarrow.array(embeddings.astype(np.float16 if job.settings.float16 else np.float32).reshape(-1))
    columns = {
        "path": pyarrow.array([name for name, _ in made], pyarrow.string()),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, job.dimension),
    }
    return pyarrow.table(columns, metadata={MADE_BY: json.dumps(header)})
