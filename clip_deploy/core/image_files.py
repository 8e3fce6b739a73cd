"""Files below a folder, as every reader of them sees them, and hashes of contents that need not be taken twice.

Links are followed, also to folders; one that leads back into a folder in which it lies ends there. What is hidden is
left out.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from clip_deploy.core.errors import DataError
from clip_deploy.core.files import Stamp

# What lies beside images and is none. Endings under which crawlers keep images are not here: .bin, .php, .tmp.
NO_IMAGES = (
    ".txt", ".md", ".rst", ".rtf", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg",
    ".log", ".html", ".htm", ".css", ".js", ".py", ".ipynb", ".sh", ".sql", ".pdf", ".doc", ".docx", ".xls", ".xlsx",
    ".ppt", ".pptx", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".parquet", ".arrow",
    ".feather", ".npy", ".npz", ".h5", ".hdf5", ".mat", ".pkl", ".pickle", ".pt", ".pth", ".safetensors", ".onnx",
    ".ckpt", ".db", ".sqlite", ".lock", ".crc", ".md5", ".sha1", ".sha256", ".mp4", ".m4v", ".mov", ".avi", ".mkv",
    ".webm", ".wmv", ".mpg", ".mpeg", ".mp3", ".m4a", ".wav", ".flac", ".ogg", ".aac", ".srt", ".vtt", ".xmp", ".aae",
    ".url", ".lnk",
)  # fmt: skip
NO_IMAGE_NAMES = ("readme", "license", "licence", "makefile", "icon\r")


@dataclass
class Listing:
    """What is below a folder, by the paths in it.

    Attributes:
        files: in the order of the names' bytes.
        skipped: folders and links that cannot be looked at, and a line that says why.
    """

    files: dict[str, Stamp] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def may_be_image(name: str) -> bool:
    """Whether a file's content decides: it is not hidden, and its name does not say that it is something else."""
    *folders, last = name.lower().split("/")
    hidden = any(part.startswith(".") for part in (*folders, last))
    return not (hidden or last.endswith(NO_IMAGES) or last in NO_IMAGE_NAMES)


def image_files(folder: Path) -> Listing:
    """All files below a folder that may be images."""
    found = walk(folder)
    return Listing({name: stamp for name, stamp in found.files.items() if may_be_image(name)}, found.skipped)


def class_files(folder: Path) -> Listing:
    """The same without the files that lie beside the classes' folders, which have no class."""
    found = image_files(folder)
    return Listing({name: stamp for name, stamp in found.files.items() if "/" in name}, found.skipped)


Above = frozenset[tuple[int, int]]  # the device and inode of each folder above


def walk(folder: Path) -> Listing:
    """All files below a folder but hidden ones. Raises DataError where the folder itself cannot be listed."""
    found = Listing()
    waiting: list[tuple[str, Above]] = [("", frozenset())]
    while waiting:
        name, above = waiting.pop()
        try:
            waiting += _look(folder, name, above, found)
        except OSError as error:
            if not name:
                raise DataError(f"{folder} cannot be listed ({error.strerror}): check its permissions") from error
            found.skipped[name] = _skipped(folder / name, error)
    found.files = dict(sorted(found.files.items(), key=lambda item: os.fsencode(item[0])))
    found.skipped = dict(sorted(found.skipped.items(), key=lambda item: os.fsencode(item[0])))
    return found


def _look(folder: Path, name: str, above: frozenset[tuple[int, int]], found: Listing) -> list[tuple[str, Above]]:
    """Note the files of one folder; its sub-folders, each with the folders that it lies in, links resolved."""
    status = os.stat(folder / name)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return []
    deeper = []
    with os.scandir(folder / name) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{name}/{entry.name}" if name else entry.name
            try:
                status = entry.stat()
            except OSError as error:
                found.skipped[path] = _skipped(folder / path, error)
                continue
            if S_ISDIR(status.st_mode):
                deeper.append((path, above | {here}))
            elif S_ISREG(status.st_mode):
                found.files[path] = Stamp(status.st_size, status.st_mtime_ns)
    return deeper


def _skipped(path: Path, error: OSError) -> str:
    if path.is_symlink() and isinstance(error, FileNotFoundError):
        return f"{path} is a link to {os.readlink(path)}, which does not exist: repair or remove it"
    return f"{path} cannot be read ({error.strerror}): check its permissions, or remove it"
