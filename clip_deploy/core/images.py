"""Image files as RGB, with Pillow and numpy alone, as the checkpoint's own processor opens them."""

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clip_deploy.core.errors import DataError
from clip_deploy.core.preprocessing import MAX_ASPECT

JPEG = b"\xff\xd8\xff"  # how each begins
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands: bytes 8 to 12 of a file
# What Pillow's parser raises where EXIF is damaged.
BROKEN_EXIF = (ArithmeticError, AttributeError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)
UNBOUNDED = ("I", "F")  # Pillow's modes without a fixed range: black and white are a matter of opinion


def read_image(path: Path) -> Image.Image:
    """Read a picture as RGB, of an animation the first frame, turned upright as EXIF says.

    What Pillow opens is read by its content, whatever its name; HEIC by pillow-heif, where that is installed. As in the
    checkpoints' own processors, what is transparent becomes white. 16 bits of grey become the upper 8.

    Raises DataError naming a file that is none, is damaged, thinner than MAX_ASPECT, or has more than Pillow's
    MAX_IMAGE_PIXELS.
    """
    return _read(path, path, lambda: _fault(path))


def decode(content: bytes, name: str, ending: str | None = None, formats: tuple[str, ...] | None = None) -> Image.Image:
    """A picture's bytes as RGB, with the messages of read_image.

    Args:
        name: for the messages.
        ending: of the file's name; without one, Pillow may guess formats that no content tells for sure, as TGA.
        formats: those of Pillow's that are accepted, besides HEIC; None is all, of which one (EPS) runs a program.

    Raises DataError naming what is none.
    """
    fault = None if content else "is empty: replace or remove it"
    return _read(BytesIO(content), name, lambda: fault, ending, formats)


@dataclass(frozen=True)
class Encoded:
    """A picture that is still in its file's bytes: to call it is to read and to decode it.

    Attributes:
        read: gives the bytes.
        name, ending, formats: as decode takes them.
    """

    read: Callable[[], bytes]
    name: str
    ending: str | None = None
    formats: tuple[str, ...] | None = None

    def __call__(self) -> Image.Image:
        return decode(self.read(), self.name, self.ending, self.formats)


def jpeg_of(image: Any) -> tuple[bytes | None, Any]:
    """The bytes of a picture's file where it is a JPEG, else None; and the picture, which is not fetched twice.

    Args:
        image: a classifier.Picture. Of a picture of Pillow, or of a call that is none of ours, there are no bytes.
    """
    if isinstance(image, Encoded):
        content = image.read()
        return content if content.startswith(JPEG) else None, replace(image, read=partial(bytes, content))
    if isinstance(image, Path | str):
        with suppress(OSError):  # read_image says what is wrong
            return _jpeg_file(image), image
    return None, image


def _jpeg_file(path: Path | str) -> bytes | None:
    """By few calls of the system: each lets Python's other threads in."""
    file = os.open(path, os.O_RDONLY)
    try:
        if os.pread(file, len(JPEG), 0) != JPEG:
            return None
        content = os.read(file, os.fstat(file).st_size)
        return content if len(content) == os.fstat(file).st_size else None
    finally:
        os.close(file)


def _read(
    file: Path | BytesIO,
    name: Path | str,
    fault: Callable[[], str | None],
    ending: str | None = None,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    try:
        with _opened(file, file.suffix if isinstance(file, Path) else ending, formats) as image:
            return rgb(image, turn=True)
    except DataError as error:
        raise DataError(f"{name} {error}") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet
        raise DataError(
            f"{name} {fault() or f'is not a readable image ({_reason(error)}): replace or remove it'}"
        ) from error


def _reason(error: Exception) -> str:
    """What Pillow or the system says, without the file's name, which Pillow's words for bytes lack."""
    if isinstance(error, UnidentifiedImageError):
        return "of no format that Pillow knows"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _opened(file: Path | BytesIO, ending: str | None, formats: tuple[str, ...] | None) -> Image.Image:
    try:
        image: Image.Image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        if not _is_heic(file):
            raise
        image = _heic(file)
    if ending is not None and _is_guessed(image.format) and _format_of(ending) != image.format:
        image.close()
        raise DataError(f"is not a readable image (it may be {image.format}, and its name does not end so): replace it")
    return image


def _is_guessed(kind: str | None) -> bool:
    """Whether no first bytes tell a format, as TGA: Pillow takes much for it."""
    opener = Image.OPEN.get(kind or "")
    return opener is not None and opener[1] is None


def _format_of(ending: str) -> str | None:
    return Image.registered_extensions().get(ending.lower())


def _is_heic(file: Path | BytesIO) -> bool:
    if isinstance(file, Path):
        with file.open("rb") as opened:
            start = opened.read(12)
    else:
        start = file.getvalue()[:12]
    return start[4:8] == b"ftyp" and start[8:12] in HEIC


def _heic(file: Path | BytesIO) -> Image.Image:
    if find_spec("pillow_heif") is None:
        raise DataError("is HEIC, which Pillow opens with pillow-heif: pip install pillow-heif")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return Image.open(file)


def _fault(path: Path) -> str | None:
    if not path.exists():
        return "does not exist: check the path"
    if path.is_dir():
        return "is a folder: give an image file"
    return "is empty: replace or remove it" if path.is_file() and path.stat().st_size == 0 else None


def rgb(image: Image.Image, turn: bool = False) -> Image.Image:
    """Any picture of Pillow as RGB.

    Args:
        turn: whether it is turned as EXIF says. Processors of transformers turn what they open themselves, and take a
            picture that is given in memory as it is.

    Raises DataError where that has no one meaning, or it is too large or too thin.
    """
    most, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if most and pixels > most:  # below twice as many, Pillow only warns
        raise DataError(f"has {pixels:,} pixels, more than {most:,}: shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise DataError(
            f"is {image.width:,} x {image.height:,} pixels: a side may be at most {MAX_ASPECT} times the other; crop it"
        )
    if image.mode in UNBOUNDED:
        raise DataError(f"has pixels of mode {image.mode}, whose range is unknown: save it with 8 bits a channel")
    if turn:
        _turn_upright(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _turn_upright(image: Image.Image) -> None:
    """Turn and mirror a picture in place as EXIF says; EXIF that cannot be read says nothing."""
    image.load()
    with suppress(*BROKEN_EXIF):
        ImageOps.exif_transpose(image, in_place=True)
