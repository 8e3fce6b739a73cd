"""Images into Parquet files, part by part: what is killed goes on where it stopped, what came or changed is taken up.

Each part holds the embeddings of `part_size` images, in the order of their names, and appears whole or not at all. Its
metadata say which package and settings made it, of which files (with sizes and times of change), and which of them
could not be read. A later run keeps each part; what is gone or changed leaves its part, and what is new or changed goes
into new ones.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.core.images import read_image
from clip_deploy.core.vectors import DTYPES, check_width, encode, read_vectors, unit
from clip_deploy.inference.classifier import Picture, ZeroShotClassifier, batched, check_count
from clip_deploy.inference.storage import (
    Files,
    Part,
    Source,
    Tables,
    check_apart,
    check_output,
    folder_id,
    list_parts,
    load_pyarrow,
    open_part,
    open_source,
    remove_part,
    remove_partial,
    shown,
    write_part,
)

MADE_BY = b"clip_deploy"  # key of a part's metadata
PART = "part-{:05}.parquet"
WAY_OUT = "give another output folder, or remove the files in this one"
OTHER_FILES = "another list of files, or files that were changed since"


@dataclass
class EmbedSettings:
    """How images are embedded; a run goes on only with the settings that it began with.

    Attributes:
        batch_size: images in one call; None for the package's best.
        part_size: images in one part, which is what a kill costs at most.
        dtype: "float32", "float16", "int8" or "binary" (vectors.DTYPES).
        dimensions: numbers of an embedding that are kept, the first ones, at unit length again; None for all.

    Raises DataError where a number is below 1 or the dtype is unknown.
    """

    batch_size: int | None = None
    part_size: int = 10_000
    dtype: str = "float32"
    dimensions: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "part_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.dtype not in DTYPES:
            raise DataError(f"dtype is {self.dtype!r}: accepted are {', '.join(DTYPES)}")


@dataclass
class Summary:
    """What a run did.

    Attributes:
        images: files or rows that are in the parts, the unreadable ones too.
        gone: embeddings that were dropped since their files are gone.
        seconds: of this run.
        unreadable: lines of path and reason, of all parts, and of folders that cannot be looked at.
    """

    images: int
    embedded_before: int = 0
    embedded_now: int = 0
    gone: int = 0
    seconds: float = 0.0
    unreadable: list[str] = field(default_factory=list)


@dataclass
class EmbedJob:
    """What every part of a run is made with, on whatever machine.

    Attributes:
        output: the parts' folder, or its URI.
        maker: what a part must have been made by to be kept; it goes into its metadata.
        width: numbers of an embedding that are kept.
    """

    output: str
    maker: dict[str, Any]
    width: int
    settings: EmbedSettings


class Package(Protocol):
    """A package that is open, or will be on other machines."""

    dimension: int
    fingerprint: str
    batch_size: int
    feed: str


Header = dict[str, Any]  # a part's metadata, with its `rows`
Plan = tuple[dict[int, Header], dict[int, Part], int]  # parts that are kept, parts to make, embeddings that are gone
Make = Callable[[EmbedJob, dict[int, Part], Callable[[int], object]], Iterable[Header]]


def embed_folder(classifier: ZeroShotClassifier, folder: Path, output: Path, settings: EmbedSettings) -> Summary:
    """Embed all images under `folder` into `output`/part-00000.parquet and so on, as `embed` does.

    Raises DataError where the folder holds no images or the output, and what `embed` raises.
    """
    check_apart(str(folder), str(output))
    source = open_source(str(folder), settings.part_size)
    return embed(classifier, source, str(output), settings, partial(make_here, classifier))


def embed(package: Package, source: Source, output: str, settings: EmbedSettings, make: Make) -> Summary:
    """Embed all images of a source into `output`/part-00000.parquet and so on.

    A part has the columns path (relative to the folder; of a table the id) and embedding ([width] of settings.dtype, as
    vectors.encode gives it). Of the parts that are there already, what is still as it was is kept. Unreadable images
    are left out, named in the summary, and tried again by the next run.

    Args:
        output: a folder, or a URI as `open_source` takes it.
        make: makes the parts that are missing, on this machine (`make_here`) or on others.

    Raises:
        DataError: embeddings have fewer numbers than settings.dimensions.
        DeployError: `output` holds parts of another package, other settings, another table or another folder, or cannot
            be written.
    """
    settings = replace(settings, batch_size=settings.batch_size or package.batch_size)
    width = check_width(settings.dimensions, package.dimension, settings.dtype)
    check_output(output)
    remove_partial(output)
    job = EmbedJob(output, _maker(package, source, settings, width), width, settings)
    present = {number: check_header(job, number) for number in _present(output)}
    plan = _resumed(job, source, present) if isinstance(source, Tables) else _updated(job, source, present)
    kept, missing, gone = plan
    before, counts = sum(_size(header) for header in kept.values()), [part.images for part in missing.values()]
    total = None if None in counts else before + sum(filter(None, counts))
    summary = Summary(before, sum(header["rows"] for header in kept.values()), gone=gone)
    summary.unreadable = [*source.skipped.values(), *_unreadable(kept.values())]
    started = monotonic()
    with tqdm(total=total, initial=before, desc="embed", disable=None) as bar:
        for header in make(job, missing, bar.update):
            summary.images += _size(header)
            summary.embedded_now += header["rows"]
            summary.unreadable += _unreadable([header])
    summary.seconds = monotonic() - started
    check_output(output)
    remove_partial(output)
    if lost := {*kept, *missing} - {*_present(output)}:
        raise DeployError(
            f"{shown(output)} lacks {len(lost)} parts that were written: look at the storage, and run again"
        )
    return summary


def _maker(package: Package, source: Source, settings: EmbedSettings, width: int) -> dict[str, Any]:
    return {
        "package": package.fingerprint,
        "feed": package.feed,
        "source": "table" if isinstance(source, Tables) else "tar" if source.packed else "folder",
        "batch_size": settings.batch_size,
        "part_size": settings.part_size,
        "dtype": settings.dtype,
        "dimensions": width,
    }


def _size(header: Header) -> int:
    found: int = header["rows"] + len(header["unreadable"])
    return found


def _unreadable(headers: Iterable[Header]) -> list[str]:
    return [line for header in headers for _, line in header["unreadable"]]


def _present(output: str) -> list[int]:
    names = list_parts(output)
    numbers = [re.fullmatch(r"part-(\d{5,})\.parquet", name) for name in names]
    if strange := [name for name, number in zip(names, numbers, strict=True) if not number]:
        raise DeployError(f"{shown(output)}/{strange[0]} was not written by `embed`: {WAY_OUT}")
    return [int(number[1]) for number in numbers if number]


def _resumed(job: EmbedJob, source: Tables, present: dict[int, Header]) -> Plan:
    """A table's parts stand for fixed rows: all that are there are kept, or none."""
    for number, header in present.items():
        if header["files"] != source.digest or number >= len(source.parts):
            raise _refused(job, number, OTHER_FILES)
    return present, {number: part for number, part in enumerate(source.parts) if number not in present}, 0


def _updated(job: EmbedJob, source: Files, present: dict[int, Header]) -> Plan:
    """Drop from the parts of a folder what is gone or changed, and plan new parts for what is new or changed.

    What is new gets the lowest free numbers. So what a killed run left to do is divided as that run would have done it.
    """
    stays = _staying(source, present)
    taken = {name for files in stays.values() for name, *_ in files}
    foreign = [number for number, header in present.items() if header["folder"] != folder_id(source.root)]
    if foreign and not taken:
        raise _refused(job, foreign[0], OTHER_FILES)
    gone = {name for header in present.values() for name in _embedded(header)} - taken - source.files.keys()
    kept = {number: _cut(job, number, present[number], files) for number, files in stays.items()}
    kept = {number: header for number, header in kept.items() if header["files"]}
    free = (number for number in count() if number not in kept)
    new = source.divide(name for name in source.files if name not in taken)
    return kept, dict(zip(free, new, strict=False)), _lost(present, gone) if source.packed else len(gone)


def _lost(present: dict[int, Header], gone: set[str]) -> int:
    """Embeddings in the parts of tar files that are gone."""
    return sum(header["rows"] for header in present.values() if {name for name, *_ in header["files"]} <= gone)


def _staying(source: Files, present: dict[int, Header]) -> dict[int, list[list[Any]]]:
    """Of each part the files that are as they were. One that two runs at once put into two parts stays in the first."""
    stays: dict[int, list[list[Any]]] = {}
    left: set[str] = set()
    for number, header in sorted(present.items()):
        left |= _readable_now(source, header)
        stays[number] = [file for file in header["files"] if source.is_current(*file) and file[0] not in left]
        left |= {name for name, *_ in stays[number]}
    return stays


def _embedded(header: Header) -> set[str]:
    return {name for name, *_ in header["files"]} - {name for name, _ in header["unreadable"]}


def _readable_now(source: Files, header: Header) -> set[str]:
    """What could not be read, and can be: where a library was missing, or the storage failed. Not in tar files."""
    if source.packed:
        return set()
    names = {name for name, _ in header["unreadable"] if name == printable(name)}
    pictures = (picture for part in source.divide(names) for picture in part.pictures())
    return {name for name, picture in pictures if _is_readable(picture)}


def _is_readable(picture: Picture) -> bool:
    try:
        picture() if callable(picture) else read_image(Path(str(picture)))
    except DataError:
        return False
    return True


def _cut(job: EmbedJob, number: int, header: Header, files: list[list[Any]]) -> Header:
    """Write a part anew with some of its files, or remove it where none is left."""
    if len(files) == len(header["files"]):
        return header
    names, name = {file[0] for file in files}, PART.format(number)
    header = header | {"files": files, "unreadable": [line for line in header["unreadable"] if line[0] in names]}
    if not files:
        remove_part(job.output, name)
        return header
    with open_part(job.output, name) as part:
        table = part.read()
    rows = table.filter([path in names for path in table.column("path").to_pylist()])
    del header["rows"]
    write_part(job.output, name, rows.replace_schema_metadata({MADE_BY: json.dumps(header)}))
    return header | {"rows": rows.num_rows}


def check_header(job: EmbedJob, number: int, part: Part | None = None) -> Header:
    """Metadata of a part that is there. Raises DeployError where it is of something else, or not of `part`."""
    way_out = f"remove it, and the same command makes it again; or {WAY_OUT}"
    header = read_header(job.output, PART.format(number), way_out)
    if not job.maker.keys() <= header.keys():
        raise _refused(job, number, "an earlier version of clip-deploy")
    for key, value in job.maker.items():
        if header.get(key) != value:
            other = f"{key} {header.get(key)}, and this run has {value}"
            raise _refused(job, number, "another package" if key == "package" else other)
    if part is not None and not part.origin.items() <= header.items():
        raise _refused(job, number, OTHER_FILES)
    return header


def _refused(job: EmbedJob, number: int, other: str) -> DeployError:
    return DeployError(f"{shown(job.output)}/{PART.format(number)} was made with {other}: {WAY_OUT}")


def read_header(output: str, name: str, way_out: str = WAY_OUT) -> Header:
    """What `embed` noted in a part, with its rows. Raises DeployError where the file is none of its parts."""
    try:
        with open_part(output, name) as part:
            found: Header = json.loads((part.metadata.metadata or {})[MADE_BY]) | {"rows": part.metadata.num_rows}
            return found
    except (OSError, ValueError, KeyError) as error:
        raise DeployError(f"{shown(output)}/{name} is not a complete part of `embed`: {way_out}") from error


def read_part(output: str, name: str, width: int) -> tuple[list[str], np.ndarray]:
    """Paths and vectors, float32 [rows, width], of a part whose header says that width."""
    with open_part(output, name) as part:
        table = part.read().combine_chunks()
    return table.column("path").to_pylist(), read_vectors(table).reshape(-1, width)


def make_here(
    classifier: ZeroShotClassifier, job: EmbedJob, missing: dict[int, Part], advance: Callable[[int], object]
) -> Iterator[Header]:
    """Make the missing parts in this process, one after the other, and give the header of each that was written."""
    yield from make_parts(classifier, job, missing.items(), advance)


def make_part(
    classifier: ZeroShotClassifier, job: EmbedJob, number: int, part: Part, advance: Callable[[int], object]
) -> Header:
    """Embed and write one part, as make_parts does."""
    return next(make_parts(classifier, job, [(number, part)], advance))


def make_parts(
    classifier: ZeroShotClassifier,
    job: EmbedJob,
    parts: Iterable[tuple[int, Part]],
    advance: Callable[[int], object],
) -> Iterator[Header]:
    """Embed and write parts; `advance` is told how many images are done. The same part has the same bytes.

    The next part is begun before the last batches of one are done, and while the one before it is written. No batch
    holds images of two parts.

    Raises DeployError where storage fails: the part is not written then.
    """
    size = job.settings.batch_size or classifier.batch_size
    names: deque[list[str]] = deque()  # of the batches that are under way
    begun: deque[Making] = deque()

    def batches() -> Iterator[list[Picture]]:
        for number, part in parts:
            begun.append(Making(number, part))
            for batch in batched(part.pictures(), size):
                names.append([name for name, _ in batch])
                yield [picture for _, picture in batch]
            names.append([])
            yield []  # the part's end

    writing: deque[Future[Header]] = deque()
    with ThreadPoolExecutor(1) as writer:
        for answers in classifier.embed_batches(batches()):
            if batch := names.popleft():
                begun[0].add(batch, answers)
                advance(len(batch))
                continue
            writing.append(writer.submit(begun.popleft().write, job))
            if len(writing) > 1:
                yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()


@dataclass
class Making:
    """A part whose images are being embedded.

    Attributes:
        made: names with their embeddings.
        unreadable: names of what cannot be read, with a line that says why.
    """

    number: int
    part: Part
    made: list[tuple[str, np.ndarray]] = field(default_factory=list)
    unreadable: list[list[str]] = field(default_factory=list)

    def add(self, names: list[str], answers: list[np.ndarray | DataError]) -> None:
        for name, embedding in zip(names, answers, strict=True):
            if isinstance(embedding, DataError):
                self.unreadable.append([name, printable(str(embedding))])
            elif printable(name) != name:
                self.unreadable.append([name, f"{printable(name)} has a name that is not UTF-8: rename it"])
            else:
                self.made.append((name, embedding))

    def write(self, job: EmbedJob) -> Header:
        header = job.maker | self.part.origin | {"unreadable": self.unreadable}
        write_part(job.output, PART.format(self.number), _table(self.made, header, job))
        return header | {"rows": len(self.made)}


def printable(text: str) -> str:
    """Bytes of a file's name that are no UTF-8 as question marks."""
    return text.encode("utf-8", "replace").decode()


def _table(made: list[tuple[str, np.ndarray]], header: Header, job: EmbedJob) -> Any:
    pyarrow, _ = load_pyarrow()
    kept = np.array([embedding[: job.width] for _, embedding in made], dtype=np.float32).reshape(-1, job.width)
    rows = encode(unit(kept) if job.settings.dimensions else kept, job.settings.dtype)
    columns = {
        "path": pyarrow.array([name for name, _ in made], pyarrow.string()),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), rows.shape[1]),
    }
    return pyarrow.table(columns, metadata={MADE_BY: json.dumps(header)})
