"""Search in what `clip-deploy embed` wrote, and small copies of the pictures that were found.

A picture's address is a row of the index: a request names no file. The copy is drawn anew, so that nothing of the file
but its pixels goes out, neither metadata nor what only looks like an image.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_deploy.core.environment import cores
from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.core.files import no_folder
from clip_deploy.core.images import JPEG, decode, rgb
from clip_deploy.inference.index import OpenIndex, OpenParts, open_embedded
from clip_deploy.web.errors import RequestError
from clip_deploy.web.models import FORMATS, VERSION, Models, Served

SIDE = 384  # pixels of the longer side: a tile of the page on a screen of twice the density
QUALITY = 85
KEPT = 1_024  # pictures in memory, of about 15 kB
MAX_FILE = 256 * 10**6  # bytes
MAX_WAITING = 512  # searches, and pictures
TRIED = 64  # rows whose files are looked for when the server starts
ADDRESS = "/v1/pictures/{version}/{row:int}"
RETRY_S = 1


class Searched:
    """An index, the package that made it, and the folder of its pictures.

    Attributes:
        served: the package.
        rows: how many images there are.
    """

    def __init__(self, folder: Path, images: Path | None, models: Models) -> None:
        """Raises DeployError where none of the packages made the index, DataError where `images` is another folder."""
        by_fingerprint = {served.classifier.fingerprint: served for served in models.served[::-1]}
        self.embedded = _opened(folder, by_fingerprint)
        self.served, self.rows = by_fingerprint[self.embedded.package], self.embedded.rows
        self.version = hashlib.sha256(repr((self.embedded.package, self.embedded.stamps)).encode()).hexdigest()[:12]
        self.root = self._root(folder, images) if images else None
        self.searches, self.drawings = Bounded(1), Bounded(cores())
        self.drawn: OrderedDict[int, bytes] = OrderedDict()

    def _root(self, folder: Path, images: Path) -> Path:
        if not images.is_dir():
            raise DataError(f"--images {images} {no_folder(images)}: give the folder that was embedded")
        root, rows = images.resolve(), np.unique(np.linspace(0, self.rows - 1, TRIED, dtype=np.int64))
        names = self.embedded.paths(rows)
        if not any(inside(root, name) for name in names):
            raise DataError(
                f"--images {images} has no file {names[0]}, as {folder} calls it: give the folder that was embedded; "
                "where the images lay in tar files or tables, they cannot be shown: leave --images out"
            )
        return root

    async def nearest(self, wanted: np.ndarray, count: int) -> list[dict[str, Any]]:
        """The `count` images nearest to `wanted` [dimension]: name, cosine, and address where it is shown."""

        def search() -> list[dict[str, Any]]:
            cosines, rows = self.embedded.nearest(wanted, count)
            return [
                {"name": name, "score": float(cosine), "image": self._address(int(row))}
                for name, cosine, row in zip(self.embedded.paths(rows), cosines, rows, strict=True)
            ]

        found: list[dict[str, Any]] = await self.searches(search)
        return found

    def _address(self, row: int) -> str | None:
        return f"/v1/pictures/{self.version}/{row}" if self.root else None

    async def picture(self, version: str, row: int) -> bytes:
        """A JPEG. Raises RequestError where the index has no such row, or its file will not do."""
        if self.root is None or version != self.version or not 0 <= row < self.rows:
            raise RequestError(404, "there is no such picture: search again")
        if row not in self.drawn:
            (name,) = await self.searches(lambda: self.embedded.paths(np.array([row])))
            self.drawn[row] = await self.drawings(lambda: small(self.root, name))  # type: ignore[arg-type]
            while len(self.drawn) > KEPT:
                self.drawn.popitem(last=False)
        self.drawn.move_to_end(row)
        return self.drawn[row]

    def close(self) -> None:
        self.searches.close()
        self.drawings.close()


class Known(Container[str]):
    """Fingerprints of the packages that are served.

    Attributes:
        asked: the last one that was looked for.
    """

    def __init__(self, fingerprints: Container[str]) -> None:
        self.fingerprints, self.asked = fingerprints, ""

    def __contains__(self, fingerprint: object) -> bool:
        self.asked = str(fingerprint)
        return fingerprint in self.fingerprints


def _opened(folder: Path, served: Mapping[str, Served]) -> OpenIndex | OpenParts:
    """The index of one of the packages, by fingerprint. Raises DeployError as open_embedded does."""
    known = Known(served)
    try:
        return open_embedded(folder, known)
    except DeployError as error:
        if not known.asked or known.asked in served:
            raise
        raise DeployError(
            f"{folder} was made by another package, {known.asked[:VERSION]}, than those that are served "
            f"({', '.join(each[:VERSION] for each in served)}): serve that one, or embed the images again"
        ) from error


class Bounded:
    """Threads for calls of which MAX_WAITING may wait."""

    def __init__(self, threads: int) -> None:
        self.pool, self.held = ThreadPoolExecutor(threads), 0

    async def __call__(self, call: Callable[[], Any]) -> Any:
        if self.held >= MAX_WAITING:
            raise RequestError(429, f"{self.held} wait already: try again", retry_after_s=RETRY_S)
        self.held += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, call)
        finally:
            self.held -= 1

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def inside(root: Path, name: str) -> Path | None:
    """The file of that name in a folder, which is resolved; None where there is none, or a link leads out."""
    try:
        path = (root / name).resolve(strict=True)
        return path if path.is_relative_to(root) and path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # not there, links in a circle, a name with a zero byte
        return None


def small(root: Path, name: str) -> bytes:
    """A JPEG of a picture in a folder. Raises RequestError where it is not in there or cannot be read."""
    gone = RequestError(404, f"{name} cannot be shown: it is gone, no image, too large, or outside of the folder")
    path = inside(root, name)
    try:
        if path is None or path.stat().st_size > MAX_FILE:
            raise gone
        picture = _read(path.read_bytes(), name, path.suffix)
    except (DataError, OSError) as error:
        raise gone from error
    picture.thumbnail((SIDE, SIDE), reducing_gap=2)
    picture.info.clear()  # a comment would be written again
    written = BytesIO()
    picture.save(written, "JPEG", quality=QUALITY)
    return written.getvalue()


def _read(content: bytes, name: str, ending: str) -> Image.Image:
    if not content.startswith(JPEG):
        return decode(content, name, ending, FORMATS)
    try:
        with Image.open(BytesIO(content), formats=("JPEG",)) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # decoded at an eighth to a half of its size
            return rgb(image, turn=True)
    except Exception as error:  # as decode does
        raise DataError(f"{name} is not a readable image ({error})") from error
