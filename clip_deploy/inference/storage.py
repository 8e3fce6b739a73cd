"""Where images come from and parts go: folders, Parquet and tar files, here or on an object store (through pyarrow)."""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote
from uuid import uuid4

from PIL import Image

from clip_deploy.core.errors import DataError, DeployError, first_line, listed
from clip_deploy.core.files import Stamp, disk_errors, no_folder
from clip_deploy.core.image_files import Listing, image_files, may_be_image, walk
from clip_deploy.core.images import Encoded
from clip_deploy.inference.classifier import Picture

STORES = ("s3", "gs", "gcs", "abfs", "abfss")  # object stores that pyarrow knows: there, a put is whole or not at all
HUB = "hf"  # Hugging Face's hub, as hf://datasets/owner/name: its library reads it, and pyarrow through that
TABLE = ".parquet"
ARROW = ".arrow"  # as save_to_disk of `datasets` writes it; cache-*.arrow beside are its own
SHARD = (".tar", ".tar.gz", ".tgz")
MAX_MEMBER = 1 << 30  # bytes of an image in a tar file, which is read into memory
# What makes a folder that holds Parquet too one of images; elsewhere no ending decides.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".heic")
FOOTERS = 16  # Parquet files whose number of rows is read at a time
ROWS = 32  # of a table, in memory at a time


class Columns(NamedTuple):
    """Names in a Parquet source: what each image is called, and its bytes (or a struct with a field `bytes`).

    Without a name for `id` that is the column "id", or the row's number where there is none.
    """

    id: str | None = None
    image: str = "image"


NAMES = Columns()


class Rows(NamedTuple):
    """Rows of one Parquet file."""

    path: str  # in its file system
    first: int
    last: int  # the first that is left out


class Part(Protocol):
    """Some of the images, in their order. Can be pickled, and read on another machine."""

    @property
    def images(self) -> int | None:
        """How many it holds; None where only reading it tells."""

    @property
    def origin(self) -> dict[str, Any]:
        """What it is made of, for its metadata: `files`, and of files in a folder `folder`."""

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        """Name and picture. Raises DeployError where storage fails, which is not the picture's fault."""


@dataclass
class Files:
    """Image files of a folder, which are read where they were listed or on any machine.

    Attributes:
        root: the folder, or its URI.
        shared: whether other machines read the files too.
        files: in their order.
        skipped: of the folder, a line for each entry that cannot be looked at.
        packed: whether they are tar files, each of which is a part.
    """

    root: str
    shared: bool
    files: dict[str, Stamp]
    part_size: int
    skipped: dict[str, str] = field(default_factory=dict)
    packed: bool = False

    @property
    def parts(self) -> list[Part]:
        return self.divide(self.files)

    def divide(self, names: Iterable[str]) -> list[Part]:
        """Parts of some of the files, in their order."""
        wanted = set(names)
        if self.packed:
            return [Shard(self.root, {name: stamp}) for name, stamp in self.files.items() if name in wanted]
        found = [(name, stamp) for name, stamp in self.files.items() if name in wanted]
        slices = (dict(found[start : start + self.part_size]) for start in range(0, len(found), self.part_size))
        return [SharedFiles(self.root, some) if self.shared else LocalFiles(self.root, some) for some in slices]

    def is_current(self, name: str, size: int, mtime_ns: int | None) -> bool:
        """Whether a file is as it was, or lies where nobody can look now."""
        behind = any(name.startswith(f"{folder}/") for folder in self.skipped)
        return behind or self.files.get(name) == (size, mtime_ns)


@dataclass
class Tables:
    """Rows of Parquet files; `digest` stands for their names, sizes, times of change and columns."""

    parts: list[Part]
    digest: str
    skipped: dict[str, str] = field(default_factory=dict)


Source = Files | Tables


@dataclass
class LocalFiles:
    """Files that are read where they were listed: what has vanished since is an unreadable image."""

    root: str
    files: dict[str, Stamp]

    @property
    def images(self) -> int | None:
        return len(self.files)

    @property
    def origin(self) -> dict[str, Any]:
        files = [[name, *stamp] for name, stamp in self.files.items()]
        return {"folder": folder_id(self.root), "files": files}

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        return ((name, Path(self.root) / name) for name in self.files)


class SharedFiles(LocalFiles):
    """Files that any machine may read: what was listed must be there, or nothing is embedded."""

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        return ((name, Encoded(partial(self._read, name), self._label(name), Path(name).suffix)) for name in self.files)

    def _label(self, name: str) -> str:
        return f"{shown(self.root)}/{name}"

    def _read(self, name: str) -> bytes:
        with storage_errors(self._label(name)):
            if folder := local(self.root):  # pyarrow refuses names that are no UTF-8
                return (folder / name).read_bytes()
            files, base = locate(self.root)
            with files.open_input_stream(f"{base}/{name}", compression=None) as stream:
                content: bytes = stream.read()
                return content


class Shard(LocalFiles):
    """The images in a tar file, as WebDataset packs them: those whose ending Pillow knows, read once from the start.

    Each is called by the tar file's name with its own behind it. What follows a damaged place is lost, which is named.
    """

    @property
    def images(self) -> int | None:
        return None

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        (name,) = self.files
        label = f"{shown(self.root)}/{name}"
        files, base = locate(self.root)
        count = 0
        with storage_errors(label), files.open_input_stream(f"{base}/{name}", compression=None) as stream:
            try:
                for member, content in _members(stream):
                    count += 1
                    yield f"{name}/{member}", Encoded(partial(bytes, content), f"{label}/{member}", Path(member).suffix)
            except (tarfile.TarError, EOFError) as error:
                said = f"{label} is damaged after its first {count:,} images ({error}): write it again"
                yield name, partial(_raise, DataError(said))


def _members(stream: Any) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the images in a tar file."""
    endings = Image.registered_extensions()
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            if member.isfile() and Path(member.name).suffix.lower() in endings and may_be_image(member.name):
                if member.size > MAX_MEMBER:
                    raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes, more than {MAX_MEMBER:,}")
                content = archive.extractfile(member)
                yield member.name, content.read() if content else b""


def _raise(error: DataError) -> Image.Image:
    raise error


@dataclass
class TableRows:
    """Rows of Parquet files."""

    where: str
    pieces: list[Rows]
    columns: Columns
    digest: str

    @property
    def images(self) -> int | None:
        return sum(piece.last - piece.first for piece in self.pieces)

    @property
    def origin(self) -> dict[str, Any]:
        return {"files": self.digest}

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        folder, _, single = locate(self.where)[1].rpartition("/")
        for piece in self.pieces:
            file = piece.path.removeprefix(f"{folder}/").removeprefix(f"{single}/")  # wherever the folder lies
            with storage_errors(piece.path):
                for row, (identity, content) in enumerate(_read_rows(self.where, piece, self.columns), piece.first):
                    name = f"{file}:{row}" if identity is None else str(identity)
                    yield name, Encoded(partial(bytes, content or b""), name)


def open_source(where: str, part_size: int, columns: Columns = NAMES, shared: bool = False) -> Source:
    """List a folder of images, of Parquet files or of tar files, or one of these files, and divide it into parts.

    Args:
        where: a path or a URI (file, s3, gs, abfs, hf).
        part_size: images a part; of tar files, each is a part.
        columns: those of Parquet files.
        shared: whether other machines read the parts too.

    Raises:
        DataError: there is nothing to embed, or files of several kinds, or a table lacks a column.
        DeployError: storage cannot be read, or pyarrow is missing.
    """
    load_pyarrow()  # whatever is missing is said before the work
    found = list_files(where)
    tables = {name: stamp for name, stamp in found.files.items() if _is_table(name)}
    images = {name: stamp for name, stamp in found.files.items() if may_be_image(name)}
    shards = {name: stamp for name, stamp in found.files.items() if name.lower().endswith(SHARD)}
    pictures = [name for name in images if name.lower().endswith(SUFFIXES)]
    kinds = {"image files": pictures, "Parquet files": list(tables), "tar files": list(shards)}
    held = {kind: names for kind, names in kinds.items() if names}
    if len(held) > 1:  # none is left out without a word
        few = min(held.values(), key=len)
        raise DataError(
            f"{shown(where)} holds {' and '.join(held)}, for example {few[0]}: give a folder with one kind of them"
        )
    if tables:
        return _tables(where, tables, part_size, columns)
    packed = bool(shards)
    if not images and not packed:
        raise _nothing(where, found, ", no Parquet and no tar files")
    folder = local(where)
    root = str(folder.absolute()) if folder else where
    if where.lower().partition("?")[0].endswith(SHARD):
        root = _above(root)
    return Files(root, shared or folder is None, shards if packed else images, part_size, found.skipped, packed)


def _above(where: str) -> str:
    """The folder of a path or URI, whose options stay."""
    path, mark, options = where.partition("?") if "://" in where else (where, "", "")
    return path.rpartition("/")[0] + mark + options


def folder_id(root: str) -> str:
    """Tells folders apart, and nobody their paths."""
    return hashlib.sha256(os.fsencode(shown(root))).hexdigest()


def _nothing(where: str, found: Listing, more: str = "") -> DataError:
    skipped = f"; {listed(list(found.skipped.values()))}" if found.skipped else ""
    return DataError(f"{shown(where)} holds no images{more}{skipped}: give a folder with image files in it or below it")


def _no_folder(path: Path, more: str = "") -> DataError:
    return DataError(f"{path} {no_folder(path)}: give a folder of images{more}")


def list_images(folder: Path) -> Listing:
    """All files under `folder` that may be images, in one order on every machine. Raises DataError where none is."""
    if not folder.is_dir():
        raise _no_folder(folder)
    found = image_files(folder)
    if not found.files:
        raise _nothing(str(folder), found)
    return found


def list_files(where: str) -> Listing:
    """What is in a folder, in the order of the names' bytes. Of a single table the path is its name."""
    folder = local(where)
    if folder is None:
        return Listing(dict(sorted(_list_store(where), key=lambda item: os.fsencode(item[0]))))
    if folder.name.lower().endswith((TABLE, ARROW, *SHARD)) and folder.is_file():
        status = folder.stat()
        return Listing({folder.name: Stamp(status.st_size, status.st_mtime_ns)})
    if not folder.is_dir():
        raise _no_folder(folder, ", of Parquet or of tar files, or one such file")
    return walk(folder)


def _list_store(where: str) -> list[tuple[str, Stamp]]:
    from pyarrow.fs import FileSelector, FileType

    files, base = locate(where)
    bucket = base.partition("/")[0]
    with storage_errors(shown(where)):
        if not where.startswith(f"{HUB}://") and files.get_file_info(bucket).type == FileType.NotFound:
            raise DataError(f"{shown(where)}: there is no bucket {bucket}: check its name, or make it")
        one = files.get_file_info(base)
        if one.type == FileType.File:
            return [(one.base_name, Stamp(one.size, one.mtime_ns))]
        found = files.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
    return [
        (file.path[len(base) :].lstrip("/"), Stamp(file.size, file.mtime_ns))
        for file in found
        if file.type == FileType.File
    ]


def _tables(where: str, found: dict[str, Stamp], part_size: int, columns: Columns) -> Tables:
    """Rows in the order of the files' names, of each file in its own order."""
    paths = _paths(where, list(found))
    with ThreadPoolExecutor(FOOTERS) as pool:
        counts = list(pool.map(partial(_count_rows, where, columns), paths))
    if not sum(counts):
        raise DataError(f"{shown(where)} holds no rows")
    pieces = _divide(list(zip(paths, counts, strict=True)), part_size)
    digest = _digest(found, columns)
    return Tables([TableRows(where, part, columns, digest) for part in pieces], digest)


def _paths(where: str, names: list[str]) -> list[str]:
    """Of files in their file system, from their names in a folder; `where` itself is one file or the folder."""
    files, base = locate(where)
    with storage_errors(shown(where)):
        return [base] if files.get_file_info(base).is_file else [f"{base}/{name}" for name in names]


def read_tables(where: str) -> Iterator[Any]:
    """Column `embedding` of each Parquet file in a folder, or of one file, as pyarrow's tables."""
    _, parquet = load_pyarrow()
    files, _ = locate(where)
    for path in _paths(where, [name for name in list_files(where).files if name.endswith(TABLE)]):
        with storage_errors(path):
            yield parquet.read_table(files.open_input_file(path), columns=["embedding"])


def _is_table(name: str) -> bool:
    last = name.lower().rpartition("/")[2]
    return last.endswith(TABLE) or (last.endswith(ARROW) and not last.startswith("cache-"))


def _count_rows(where: str, columns: Columns, path: str) -> int:
    _, parquet = load_pyarrow()
    files, _ = locate(where)
    with storage_errors(path):
        if path.lower().endswith(ARROW):
            if not local(where):
                raise DataError(f"{path}: Arrow files can be read from a disk only: give Parquet here")
            schema, batches = _open_arrow(path)
            _check_columns(path, schema, columns)
            return sum(batch.num_rows for batch in batches)
        with files.open_input_file(path) as opened:
            table = parquet.ParquetFile(opened)
            _check_columns(path, table.schema_arrow, columns)
            found: int = table.metadata.num_rows
            return found


def _check_columns(path: str, schema: Any, columns: Columns) -> None:
    """Raise DataError where a table lacks a column, or its images are no bytes."""
    if missing := [name for name in columns if name and name not in schema.names]:
        raise DataError(
            f"{path} has no column {missing[0]!r}: it has {', '.join(schema.names)}; name them by --id-column and "
            "--image-column"
        )
    kind = schema.field(columns.image).type
    if not _holds_bytes(kind):
        raise DataError(f"{path}: its column {columns.image!r} holds {kind}: give the bytes of image files")


def _open_arrow(path: str) -> tuple[Any, Iterator[Any]]:
    """Schema and record batches of an Arrow file, mapped into memory: of the streaming format, or the other."""
    pyarrow, _ = load_pyarrow()
    mapped = pyarrow.memory_map(path)
    if mapped.read(6) != b"ARROW1":
        mapped.seek(0)
        reader = pyarrow.ipc.open_stream(mapped)
        return reader.schema, iter(reader)
    reader = pyarrow.ipc.open_file(mapped)
    return reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))


def _holds_bytes(kind: Any) -> bool:
    """Whether a type of pyarrow is bytes, or a struct with a field `bytes`, as Hugging Face writes it."""
    pyarrow, _ = load_pyarrow()
    types = pyarrow.types
    if types.is_struct(kind):
        field = kind.get_field_index("bytes")
        return field >= 0 and _holds_bytes(kind.field(field).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind))


def _divide(counts: list[tuple[str, int]], part_size: int) -> list[list[Rows]]:
    """Rows by parts; a part may begin in one file and end in another."""
    parts: list[list[Rows]] = []
    room = 0
    for path, count in counts:
        first = 0
        while first < count:
            if not room:
                parts.append([])
                room = part_size
            last = min(count, first + room)
            parts[-1].append(Rows(path, first, last))
            first, room = last, room - (last - first)
    return parts


def _read_rows(where: str, rows: Rows, columns: Columns) -> Iterator[tuple[Any, bytes | None]]:
    """Names, None where the table has none, and images' bytes, few at a time."""
    if rows.path.lower().endswith(ARROW):
        _, batches = _open_arrow(rows.path)
        yield from _named_images(batches, 0, rows, columns)
        return
    _, parquet = load_pyarrow()
    files, _ = locate(where)
    with files.open_input_file(rows.path) as opened:
        table = parquet.ParquetFile(opened)
        at, groups = 0, []
        for number in range(table.metadata.num_row_groups):
            count = table.metadata.row_group(number).num_rows
            if at < rows.last and at + count > rows.first:
                groups.append((number, at))
            at += count
        known = [name for name in {columns.id or "id", columns.image} if name in table.schema_arrow.names]
        batches = table.iter_batches(ROWS, [number for number, _ in groups], columns=known)
        yield from _named_images(batches, groups[0][1], rows, columns)


def _named_images(batches: Iterable[Any], at: int, rows: Rows, columns: Columns) -> Iterator[tuple[Any, bytes | None]]:
    """Those of `rows` among record batches of which the first begins at row `at`."""
    identity = columns.id or "id"
    for batch in batches:
        begin, end = max(0, rows.first - at), min(rows.last - at, len(batch))
        for first in range(begin, end, ROWS):
            wanted = batch.slice(first, min(ROWS, end - first))
            named = identity in batch.schema.names
            called = wanted.column(identity).to_pylist() if named else [None] * len(wanted)
            for name, image in zip(called, wanted.column(columns.image).to_pylist(), strict=True):
                yield name, image["bytes"] if isinstance(image, dict) else image
        at += len(batch)
        if at >= rows.last:
            return


def _digest(stamps: dict[str, Stamp], columns: Columns) -> str:
    digest = hashlib.sha256(repr(columns).encode())
    for name, (size, mtime_ns) in stamps.items():
        digest.update(os.fsencode(name) + f"\0{size} {mtime_ns}\0".encode())
    return digest.hexdigest()


def list_parts(output: str) -> list[str]:
    """Names of the parts that are there."""
    folder = local(output)
    names = (path.name for path in folder.glob("part-*")) if folder else (name for name, _ in _list_store(output))
    return sorted(name for name in names if name.startswith("part-") and name.endswith(TABLE))


def remove_part(output: str, name: str) -> None:
    """Delete a part of an output. Raises DeployError where the storage refuses."""
    files, base = locate(output)
    with storage_errors(f"{shown(output)}/{name}"):
        files.delete_file(f"{base}/{name}")


def has_part(output: str, name: str) -> bool:
    """Whether an output has that part. Raises DeployError where the storage cannot be asked."""
    files, base = locate(output)
    with storage_errors(shown(output)):
        found: bool = files.get_file_info(f"{base}/{name}").is_file
        return found


def check_output(output: str) -> None:
    """Raise DataError where parts cannot be written since a file stands in the way."""
    folder = local(output)
    for path in (folder, *folder.parents) if folder else ():
        if path.exists():
            if not path.is_dir():
                raise DataError(f"{output} cannot be the output folder, because {path} is a file: give a new folder")
            return


def check_apart(source: str, output: str) -> None:
    """Raise DataError where parts would lie within the folder that is embedded, whose files they would then be."""
    read, written = local(source), local(output)
    if read is None or written is None:
        within = f"{shown(output)}/".startswith(f"{shown(source)}/")
    else:
        within = read.is_dir() and written.resolve().is_relative_to(read.resolve())
    if within:
        raise DataError(
            f"the output {shown(output)} lies within the source {shown(source)}, which would then hold files of two "
            "kinds: give a folder beside it"
        )


def remove_partial(output: str) -> None:
    """Remove what killed processes left half written."""
    folder = local(output)
    for left in folder.glob(".part-*.partial") if folder else ():
        left.unlink(missing_ok=True)


def write_part(output: str, name: str, table: Any) -> None:
    """Write a Parquet file whole or not at all, also where two machines write the same one at once."""
    pyarrow, parquet = load_pyarrow()
    written = pyarrow.BufferOutputStream()
    whole = pyarrow.types.is_integer(table.schema.field("embedding").type.value_type)  # Parquet keeps them in 32 bits
    bare = table.replace_schema_metadata()  # else Arrow's schema, which Parquet keeps too, would repeat it
    with parquet.ParquetWriter(written, bare.schema, use_dictionary=True if whole else ["path"]) as writer:
        writer.write_table(bare)
        writer.add_key_value_metadata(table.schema.metadata or {})
    folder = local(output)
    if not folder:
        files, base = locate(output)
        with storage_errors(f"{shown(output)}/{name}"), files.open_output_stream(f"{base}/{name}") as stream:
            stream.write(written.getvalue())
        return
    partial_file = folder / f".{name}.{uuid4().hex}.partial"
    with disk_errors(folder / name):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            partial_file.write_bytes(written.getvalue())
            partial_file.replace(folder / name)
        finally:
            partial_file.unlink(missing_ok=True)


@contextmanager
def open_part(output: str, name: str) -> Iterator[Any]:
    """A part as pyarrow's ParquetFile."""
    _, parquet = load_pyarrow()
    files, base = locate(output)
    with files.open_input_file(f"{base}/{name}") as opened:
        yield parquet.ParquetFile(opened)


def local(where: str) -> Path | None:
    """The path on this machine that is meant, or None for one of an object store."""
    scheme, separator, rest = where.partition("://")
    if not separator:
        return Path(where)
    if scheme == "file":
        return Path(unquote(rest))
    if scheme not in (*STORES, HUB):
        known = ", ".join((*STORES, HUB))
        raise DataError(f"{shown(where)} begins with {scheme}: accepted are a path, or a URI of file, {known}")
    return None


@cache
def locate(where: str) -> tuple[Any, str]:
    """A file system of pyarrow, and the path in it."""
    load_pyarrow()
    from pyarrow.fs import FileSystem, LocalFileSystem

    if folder := local(where):
        return LocalFileSystem(), str(folder.absolute())
    with storage_errors(shown(where)):
        files, base = _hub(where) if where.startswith(f"{HUB}://") else FileSystem.from_uri(where)
    return files, base.rstrip("/")


def _hub(where: str) -> tuple[Any, str]:
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    try:
        from huggingface_hub import HfFileSystem
    except ImportError as error:
        raise DeployError(f"{where} needs huggingface_hub: pip install huggingface_hub") from error
    return PyFileSystem(FSSpecHandler(HfFileSystem())), where.removeprefix(f"{HUB}://")


def shown(where: str) -> str:
    """A path or URI for messages, without keys and options."""
    return re.sub(r"://[^/@]*:[^/@]*@", "://", where.partition("?")[0] if "://" in where else where).rstrip("/")


@contextmanager
def storage_errors(name: str) -> Iterator[None]:
    """Say in one line that storage failed: to leave out an image for that would lose it."""
    pyarrow, _ = load_pyarrow()
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise DeployError(f"{name} cannot be read or written here ({reason}): check it, and run again") from error


def load_pyarrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet, which nothing else in a deployment needs."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DeployError("Parquet and object stores need pyarrow: pip install 'clip-deploy[parquet]'") from error
    return pyarrow, parquet
