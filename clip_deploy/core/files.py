"""Files and folders, written whole or not at all; hashes, remembered."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from clip_deploy.core.errors import EVERY_ROW, DiskError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked, and nothing removed
    fcntl = None  # type: ignore[assignment]

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ADVICE = {
    **dict.fromkeys(DISK_FULL_ERRNOS, "free some space (`dvc gc -w` drops artifacts that no commit here uses)"),
    errno.EFBIG: "raise the limit on a file's size (`ulimit -f`), or take another file system",
    errno.EROFS: "the file system is read-only: mount it writable or clone elsewhere",
    errno.EACCES: "make the folder writable for this user",
    errno.EPERM: "make the folder writable for this user",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away",
    errno.EEXIST: "a file stands where a folder is needed: move it away",
}
NO_TEMPORARY = "No usable temporary directory"  # tempfile's words, also where a library that is imported asks for one


def no_folder(path: Path) -> str:
    """What is wrong with a path that is no folder, for messages."""
    return "is a file" if path.exists() else "does not exist"


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place on success and vanishes on failure.

    Where it cannot take its place, the former one comes back. A process that is killed leaves `output` whole, or not
    there between two renames.
    """
    partial, former = (output.with_name(f".{output.name}.{kind}.partial") for kind in ("new", "former"))
    with disk_errors(output):
        for left in (partial, former):  # by a killed process
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if output.is_dir():
                output.replace(former)
            partial.replace(output)
        finally:
            if former.is_dir() and not output.exists():
                former.replace(output)
            for spent in (partial, former):
                shutil.rmtree(spent, ignore_errors=True)


@contextmanager
def own_folder(prefix: str) -> Iterator[Path]:
    """A folder of one process's own, in the machine's temporary folder; `prefix` begins its name and ends with "-".

    Those that killed processes of this user left there are removed. None says of which process it is, which may be one
    of another container: so a lock of the kernel is held on each, and one that is free says that its process has ended.
    """
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{prefix}*") if fcntl else ():
        with suppress(OSError), held(left):  # its process lives, or it is another user's
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".clip-deploy-"))
    try:
        with held(folder):
            folder = folder.rename(parent / f"{prefix}{folder.name.rpartition('-')[2]}")  # now that it is held
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def held(path: Path) -> Iterator[tuple[int, ...]]:
    """Lock a file or folder as long as a process has the descriptors; BlockingIOError where others hold it."""
    if fcntl is None:
        yield ()
        return
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # neither a link nor a pipe of someone else
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield (file,)
    finally:
        os.close(file)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say in one line that `path` cannot be written, and what to do."""
    try:
        yield
    except EVERY_ROW:
        raise
    except Exception as error:
        code = disk_error_code(error)
        if code is None:
            raise
        raise DiskError(f"cannot write {path}: {os.strerror(code)}; {ADVICE[code]}") from error


def disk_error_code(error: BaseException) -> int | None:
    """The system's code of a disk that refuses, behind an exception; native libraries only quote the system's words."""
    if NO_TEMPORARY in str(error):
        return errno.ENOSPC
    own, causes = getattr(error, "errno", None), [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    full = [code for cause in causes for code in DISK_FULL_ERRNOS if os.strerror(code) in str(cause)]
    return own if own in ADVICE else next(iter(full), None)


RACY_NS = 2_000_000_000  # the coarsest time of change (FAT's): a younger file can change again and look the same

Hash = Callable[[Path], str]  # SHA-256 of a file's content, as hexadecimal digits


class Stamp(NamedTuple):
    """What tells whether a file was replaced: an object store gives no other hash of all its objects."""

    size: int
    mtime_ns: int | None  # None where the storage keeps none


def sha256(path: Path) -> str:
    """Of a file's content, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def remembered(memory: Path) -> Iterator[Hash]:
    """A hash of files that reads only those whose size, times or inode changed since `memory` was written.

    A file that changed just before it was hashed is not remembered: it may change once more within the same tick of the
    file system's clock. A memory that is missing, damaged or cannot be written costs time only.
    """
    known = _recall(memory)
    used: dict[str, list[Any]] = {}

    def hash_file(path: Path) -> str:
        name, now, before = os.path.abspath(path), time.time_ns(), _identity(path)
        if name in known and known[name][:-1] == before:
            used[name] = known[name]
        else:
            digest = sha256(path)
            if max(before[1:3]) >= now - RACY_NS or before != _identity(path):
                return digest
            used[name] = [*before, digest]
        found: str = used[name][-1]
        return found

    yield hash_file
    if used != known:
        _remember(memory, used)


def _identity(path: Path) -> list[int]:
    """Of what a path leads to. The time of change of the inode cannot be set: it tells what `cp -p` hides."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _recall(memory: Path) -> dict[str, list[Any]]:
    """What was written, if its first line is the hash of the rest."""
    try:
        digest, _, content = memory.read_bytes().partition(b"\n")
    except OSError:
        return {}
    return json.loads(content) if hashlib.sha256(content).hexdigest().encode() == digest else {}


def _remember(memory: Path, used: dict[str, list[Any]]) -> None:
    content = json.dumps(used).encode()
    partial = memory.with_name(f".{memory.name}.{uuid4().hex}.partial")
    with suppress(OSError):  # the next run takes the hashes again
        try:
            memory.parent.mkdir(exist_ok=True)
            partial.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            partial.replace(memory)
        finally:
            partial.unlink(missing_ok=True)
