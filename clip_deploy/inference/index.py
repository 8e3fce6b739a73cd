"""An index of what `embed` wrote, so that a search reads a part of the vectors: FAISS's inverted lists, and the paths.

A folder of three files: the vectors (FAISS's own format, which is mapped into memory), the images' paths in the same
order (Parquet), and what they were made of (JSON). Vectors that lie in one direction from the mean of all form a cell,
and a search looks into the cells that are nearest to the text. Below MIN_ROWS there is one cell: a search is exact.

Vectors keep their type: float32 and float16 as they are, of binary the signs, which are held against a text in float as
in parts. int8 is rounded once more, to 256 steps between the lowest and the highest number of each dimension, since
FAISS knows no scale of a row.
"""

import json
import math
import os
import warnings
from collections.abc import Container, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clip_deploy.core.errors import DataError, DeployError, first_line
from clip_deploy.core.files import new_folder, write_text
from clip_deploy.core.parsing import parse, plain
from clip_deploy.core.vectors import cut, unit
from clip_deploy.inference.embed import read_header, read_part
from clip_deploy.inference.storage import list_files, list_parts, load_pyarrow, local, shown

VECTORS, PATHS, RECORD = "vectors.faiss", "paths.parquet", "vectors.json"
MIN_ROWS = 10_000  # of an index with several cells
SAMPLE = 50  # rows a cell, by which the cells are found
PROBED = 8  # of so many cells one is searched; a text is far from all images, and its nearest lie in many cells
GROUP = 1000  # paths that are read for one of them
AGAIN = "make it again with `clip-deploy index`"


@dataclass(frozen=True)
class IndexRecord:
    """What an index was made of.

    Attributes:
        package: the fingerprint of the package that embedded the images.
        parts: their folder, relative to the index; None where they are on an object store.
        stamps: of each part its size in bytes and its time of change.
        sizes: bytes of the index's other files.
    """

    package: str
    dtype: str
    dimensions: int
    rows: int
    cells: int
    parts: str | None
    stamps: dict[str, list[int | None]]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Parts:
    """Parts of one package and type. `source` is their folder or URI, `stamps` is as in IndexRecord."""

    source: str
    package: str
    dtype: str
    dimensions: int
    rows: int
    stamps: dict[str, list[int | None]]

    def read(self, doing: str) -> Iterator[tuple[list[str], np.ndarray]]:
        """Paths and vectors, float32 [rows, dimensions], of one part after the other."""
        for name in tqdm(self.stamps, doing, disable=None):
            paths, vectors = read_part(self.source, name, self.dimensions)
            yield paths, np.ascontiguousarray(vectors)


def build_index(source: str, output: str) -> IndexRecord:
    """Make an index of `embed`'s parts; it appears whole or not at all, in the place of an earlier one.

    The parts are in memory one at a time, and are read twice: to find the cells, and to fill them. The index itself is
    in memory until it is written.

    Args:
        source: a folder of parts, or its URI.
        output: a folder of this machine.

    Raises:
        DataError: there is nothing to index, or `output` is something else.
        DeployError: the parts are not of one package and type, or a library is missing.
    """
    folder = _output(output)
    faiss, parts = load_faiss(), _parts(source)
    index, mean = _empty(faiss, parts)
    with new_folder(folder) as partial:
        _fill(faiss, index, mean, parts, partial / PATHS)
        faiss.write_index(index, str(partial / VECTORS))
        record = IndexRecord(
            package=parts.package,
            dtype=parts.dtype,
            dimensions=parts.dimensions,
            rows=index.ntotal,
            cells=index.nlist,
            parts=os.path.relpath(here, folder) if (here := local(source)) else None,
            stamps=parts.stamps,
            sizes={name: (partial / name).stat().st_size for name in (VECTORS, PATHS)},
        )
        write_text(partial / RECORD, json.dumps(plain(record), indent=1) + "\n")
    return record


def _output(output: str) -> Path:
    """Raises DataError where something else would be lost."""
    folder = local(output)
    if folder is None:
        raise DataError(
            f"{shown(output)} is on an object store: an index is mapped into memory; give a folder on this machine"
        )
    folder = Path(os.path.abspath(folder))
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and not is_index(folder):
        raise DataError(f"{folder} exists and is not an index: give another folder")
    return folder


def _parts(source: str) -> Parts:
    if (folder := local(source)) and not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one that `clip-deploy embed` wrote")
    stamps = _stamps(source)
    headers = {name: read_header(source, name) for name in stamps}
    keys = "package", "dtype", "dimensions"
    made: list[dict[str, Any]] = [{key: header.get(key) for key in keys} for header in headers.values()]
    for name, other in zip(headers, made, strict=True):
        if None in other.values():
            raise DeployError(f"{shown(source)}/{name} was made with an earlier version of clip-deploy: embed again")
        if other != made[0]:
            raise DeployError(f"{shown(source)} holds parts of two packages or types, as {name}: embed again")
    rows = sum(header["rows"] for header in headers.values())
    if not rows:
        raise DataError(f"{shown(source)} holds no embeddings: give a folder that `clip-deploy embed` wrote")
    return Parts(source, **made[0], rows=rows, stamps=stamps)


def _stamps(source: str) -> dict[str, list[int | None]]:
    names = list_parts(source)
    files = list_files(source).files if names else {}
    return {name: list(files[name]) for name in names}


def _empty(faiss: Any, parts: Parts) -> tuple[Any, np.ndarray]:
    """FAISS's index of no vectors, with its cells; and the mean of all, around which they lie."""
    kinds, cells = faiss.ScalarQuantizer, 1 if parts.rows < MIN_ROWS else math.isqrt(parts.rows)
    kind = {"float16": kinds.QT_fp16, "int8": kinds.QT_8bit, "binary": kinds.QT_1bit_tqmse}.get(parts.dtype)
    given = faiss.IndexFlatIP(parts.dimensions), parts.dimensions, cells
    if kind is None:
        index = faiss.IndexIVFFlat(*given, faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexIVFScalarQuantizer(*given, kind, faiss.METRIC_INNER_PRODUCT, False)
    index.cp.min_points_per_centroid = 1  # else it warns on standard output
    sample, mean, low, high = _sample(parts, cells)
    index.train(unit(sample - mean))
    if parts.dtype == "int8":
        faiss.copy_array_to_vector(np.concatenate([low, high - low]), index.sq.trained)
    return index, mean


def _sample(parts: Parts, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Some vectors, by which cells are found; of all of them each dimension's mean, lowest and highest number."""
    random, drawn, total = np.random.default_rng(0), [], np.zeros(parts.dimensions)
    low, high = (np.full(parts.dimensions, bound, np.float32) for bound in (np.inf, -np.inf))
    for _, vectors in parts.read("find cells"):
        drawn.append(vectors[random.random(len(vectors)) < SAMPLE * cells / parts.rows])
        total += vectors.sum(axis=0, dtype=np.float64)
        low, high = np.minimum(low, vectors.min(0, initial=np.inf)), np.maximum(high, vectors.max(0, initial=-np.inf))
    return np.concatenate(drawn), (total / parts.rows).astype(np.float32), low, high


def _fill(faiss: Any, index: Any, mean: np.ndarray, parts: Parts, paths: Path) -> None:
    """Vectors into their cells, and what they are called into a table in groups of few rows.

    FAISS would choose the cell by the vector itself: all images of a CLIP model lie in one direction, which hides in
    what they differ. On clusters around such a direction that found half as much as by what is left without the mean.
    """
    pyarrow, parquet = load_pyarrow()
    schema = pyarrow.schema([("path", pyarrow.string())])
    with parquet.ParquetWriter(paths, schema) as table:
        for names, vectors in parts.read("index"):
            table.write_table(pyarrow.table([names], schema=schema), GROUP)
            _, cells = index.quantizer.search(unit(vectors - mean), 1)
            rows = np.arange(index.ntotal, index.ntotal + len(vectors))
            index.add_core(len(vectors), *map(faiss.swig_ptr, (vectors, rows, cells)))


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index, be it whole or not, rather than parts of `embed`."""
    return any((folder / name).is_file() for name in (VECTORS, RECORD))


def search_index(folder: Path, package: str, wanted: np.ndarray, top: int) -> list[tuple[float, str]]:
    """Cosines and paths of the `top` images nearest to `wanted`, the nearest first.

    Warns and raises as OpenIndex does.
    """
    with closing(OpenIndex(folder, {package})) as index:
        cosines, rows = index.nearest(wanted, top)
        return list(zip(cosines.tolist(), index.paths(rows), strict=True))


class OpenIndex:
    """An index, opened for many searches; its vectors stay on the disk. One thread at a time may use it.

    Attributes:
        package: the fingerprint of the package that embedded the images.
        rows: how many images there are.
        stamps: as in IndexRecord.
    """

    def __init__(self, folder: Path, packages: Container[str]) -> None:
        """Warns where parts changed since.

        Args:
            folder: what build_index wrote.
            packages: fingerprints, one of which must be the index's.

        Raises DeployError where another package made the parts, or the index is damaged.
        """
        self.folder, self.record = folder, _read_record(folder)
        self.package, self.rows, self.stamps = self.record.package, self.record.rows, self.record.stamps
        if self.package not in packages:
            raise _foreign(folder)
        if _is_stale(folder, self.record):
            warnings.warn(f"{folder} is older than its parts, which changed since: {AGAIN}", stacklevel=3)
        self.vectors, self.table = _open(folder, self.record), _open_paths(folder)

    def nearest(self, wanted: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and rows of the `top` images nearest to `wanted`, the nearest first.

        Args:
            wanted: float32 [dimension], of unit length.
        """
        cosines, rows = _nearest(self.vectors, cut(wanted, self.record.dimensions)[None], top, self.record)
        if not ((rows >= 0) & (rows < self.rows) & (np.abs(cosines) < 1.01)).all():
            raise _damaged(self.folder, f"{VECTORS} holds other rows")
        return cosines, rows

    def paths(self, rows: np.ndarray) -> list[str]:
        """What these rows are called; of the table no more is read than the groups that hold them."""
        pyarrow, _ = load_pyarrow()
        found: dict[int, str] = {}
        try:
            metadata = self.table.metadata
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            ends = np.cumsum(counts)
            for group in np.unique(np.searchsorted(ends, rows, side="right")).tolist():
                first = int(ends[group]) - counts[group]
                names = self.table.read_row_group(group, columns=["path"]).column("path")
                inside = rows[(rows >= first) & (rows < ends[group])].tolist()
                found |= {row: names[row - first].as_py() for row in inside}
        except (OSError, IndexError, KeyError, pyarrow.ArrowException) as error:
            raise _damaged(self.folder, f"{PATHS}: {first_line(error)}") from error
        return [found[row] for row in rows.tolist()]

    def close(self) -> None:
        self.table.close()


class OpenParts:
    """`embed`'s parts in memory, as float32 whatever their type, for many searches of all; otherwise as OpenIndex."""

    def __init__(self, folder: Path, packages: Container[str]) -> None:
        """Raises DataError where there is nothing to search, DeployError where the parts are not of these packages."""
        parts = _parts(str(folder))
        self.package, self.rows, self.stamps = parts.package, parts.rows, parts.stamps
        if self.package not in packages:
            raise _foreign(folder)
        read = list(parts.read("open"))
        self.vectors = np.concatenate([vectors for _, vectors in read])
        self.names = [path for paths, _ in read for path in paths]

    def nearest(self, wanted: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        cosines = self.vectors @ cut(wanted, self.vectors.shape[1])
        top = min(top, len(cosines))
        rows = np.sort(np.argpartition(-cosines, top - 1)[:top])
        rows = rows[np.argsort(-cosines[rows], kind="stable")]
        return cosines[rows], rows

    def paths(self, rows: np.ndarray) -> list[str]:
        return [self.names[row] for row in rows.tolist()]


def open_embedded(folder: Path, packages: Container[str]) -> OpenIndex | OpenParts:
    """What `embed` or `index` wrote, opened for many searches. Raises as OpenIndex and OpenParts do."""
    return OpenIndex(folder, packages) if is_index(folder) else OpenParts(folder, packages)


def _foreign(folder: Path) -> DeployError:
    return DeployError(f"{folder} was made by another package: search with that one, or embed the images again")


def _read_record(folder: Path) -> IndexRecord:
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{RECORD}: {first_line(error)}") from error
    return parse(IndexRecord, content, str(folder / RECORD), AGAIN)


def _damaged(folder: Path, reason: str) -> DeployError:
    return DeployError(f"{folder} is not a complete index ({reason}): {AGAIN}")


def _is_stale(folder: Path, record: IndexRecord) -> bool:
    """Whether parts came, went or changed; where they lie on an object store or elsewhere now, nobody knows."""
    parts = None if record.parts is None else folder / record.parts
    return parts is not None and parts.is_dir() and _stamps(str(parts)) != record.stamps


def _open(folder: Path, record: IndexRecord) -> Any:
    """FAISS's index, mapped into memory."""
    faiss = load_faiss()
    for name, size in record.sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise _damaged(folder, f"{name} has not the {size:,} bytes that were written")
    try:
        index = faiss.read_index(str(folder / VECTORS), faiss.IO_FLAG_MMAP)
    except (RuntimeError, MemoryError) as error:  # FAISS's own, and what sizes that are wrong lead to
        raise _damaged(folder, f"{VECTORS} cannot be read") from error
    if (index.d, index.ntotal, getattr(index, "nlist", 0)) != (record.dimensions, record.rows, record.cells):
        raise _damaged(folder, f"{VECTORS} holds other vectors")
    return index


def _nearest(index: Any, wanted: np.ndarray, top: int, record: IndexRecord) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and rows; in all cells where those that are searched first hold too few."""
    top = min(top, record.rows)
    index.nprobe = math.ceil(record.cells / PROBED)
    (cosines,), (rows,), (vectors,) = index.search_and_reconstruct(wanted, top)
    if (rows < 0).any():
        index.nprobe = record.cells
        (cosines,), (rows,), (vectors,) = index.search_and_reconstruct(wanted, top)
    if record.dtype in ("int8", "binary"):  # FAISS's numbers are those of codes, whose length is not 1
        with np.errstate(over="ignore", invalid="ignore"):  # of what is damaged
            cosines = unit(vectors) @ wanted[0]
    order = np.argsort(-cosines, kind="stable")
    return cosines[order], rows[order]


def _open_paths(folder: Path) -> Any:
    """The table of paths, which stays open: an index that takes this one's place changes nothing."""
    pyarrow, parquet = load_pyarrow()
    try:
        return parquet.ParquetFile(folder / PATHS)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(folder, f"{PATHS}: {first_line(error)}") from error


def load_faiss() -> Any:
    """The module faiss. Raises DeployError with what pip must install where it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise DeployError("an index needs FAISS: pip install 'clip-deploy[index]'") from error
    return faiss
