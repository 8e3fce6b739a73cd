"""What a JPEG file says before its pixels: their number, their colours, and how the picture lies.

Read here, since libjpeg's bindings give Python's lock up for every header. Where other threads want it too, to have it
back takes hundreds of times as long as to read one.
"""

import struct
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from clip_deploy.core.preprocessing import MAX_ASPECT

FLIPS: dict[int, tuple[int, ...]] = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}  # rows 0, columns 1
LYING = (5, 6, 7, 8)
FRAMES = (0xC0, 0xC1, 0xC2)  # markers of a baseline, an extended and a progressive picture in Huffman's code
FRAME = struct.Struct(">BHHB")  # bits of a number, height, width, channels; three bytes of each channel follow
JFIF, EXIF, ADOBE = 0xE0, 0xE1, 0xEE  # markers of what applications say
SCAN = 0xDA  # the marker behind which the pixels begin
FILL = 0xFF  # stands before each marker, any number of times
END = b"\xff\xd9"  # the marker at a JPEG's end
TRAILER = 1024  # bytes behind a whole picture, at most; with more, Pillow says whether it is whole


class Header(NamedTuple):
    """How a picture lies in its file, by EXIF's numbers, and the upright picture's height and width."""

    lies: int
    height: int
    width: int

    def as_stored(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in the file of what is so high and wide when it is upright."""
        return (width, height) if self.lies in LYING else (height, width)


class Jpeg(NamedTuple):
    """A file's content, bytes or uint8 [length], and what its header says."""

    content: Any
    header: Header


def whole_jpeg(content: bytes | None) -> Jpeg | None:
    """None where it is for Pillow to read or to refuse: as read_header says, or without its end."""
    if not content or not (content.endswith(END) or END in content[-TRAILER:]):
        return None
    header = read_header(content)
    return Jpeg(content, header) if header else None


def read_header(jpeg: bytes) -> Header | None:
    """None where the file is for Pillow to read or to refuse: none, of rare colours or codes, too large or too thin."""
    try:
        segments = _segments(jpeg)
        (frame,) = [content for marker in FRAMES for content in segments.get(marker, ())]
        bits, height, width, channels = FRAME.unpack_from(frame)
        lies = _lies(jpeg, segments)
    except Exception:  # of whatever is wrong, Pillow's own reading says it
        return None
    is_known = bits == 8 and len(frame) == FRAME.size + 3 * channels and height * width > 0
    if not is_known or not _has_common_colours(frame[FRAME.size :: 3], segments) or is_refused(height, width):
        return None
    return Header(lies, *((width, height) if lies in LYING else (height, width)))


def is_refused(height: int, width: int) -> bool:
    """Whether Pillow warns of so many pixels, or the image is too thin: images.rgb says so of both."""
    most = Image.MAX_IMAGE_PIXELS
    return bool(most and height * width > most) or max(height, width) > MAX_ASPECT * min(height, width)


def orientation(jpeg: bytes) -> int:
    """How the picture lies in the file, by EXIF's numbers; 1 is upright.

    Raises ValueError where its segments cannot be followed, and what Pillow raises where EXIF is damaged.
    """
    return _lies(jpeg, _segments(jpeg))


def upright(pixels: np.ndarray, lies: int) -> np.ndarray:
    """A picture [height, width, 3] turned as Pillow's exif_transpose does."""
    pixels = pixels.swapaxes(0, 1) if lies in LYING else pixels
    return np.flip(pixels, FLIPS[lies]) if lies in FLIPS else pixels


def _segments(jpeg: bytes) -> dict[int, list[bytes]]:
    """The contents of those before the first scan, by their markers.

    Raises ValueError, or IndexError where the file ends.
    """
    found: dict[int, list[bytes]] = {}
    place = 2
    while jpeg[place] == FILL:
        marker = jpeg[place + 1]
        if marker == SCAN:
            return found
        if marker == FILL:
            place += 1
            continue
        behind = place + 2 + _number(jpeg, place + 2)
        found.setdefault(marker, []).append(jpeg[place + 4 : behind])
        place = behind
    raise ValueError(f"no segment begins at byte {place}")


def _number(content: bytes, place: int) -> int:
    return content[place] << 8 | content[place + 1]


def _lies(jpeg: bytes, segments: dict[int, list[bytes]]) -> int:
    told = segments.get(EXIF, ())
    if not any(content.startswith(b"Exif\0") or b"tiff:Orientation" in content for content in told):
        return 1  # most files say nothing, and to open one takes its time
    with Image.open(BytesIO(jpeg)) as image:
        found: int = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found


def _has_common_colours(channels: bytes, segments: dict[int, list[bytes]]) -> bool:
    """Whether they are grey, or YCbCr as libjpeg's default_decompress_parms (jdapimin.c) finds it out.

    Args:
        channels: their numbers.
    """
    if len(channels) != 3:
        return len(channels) == 1
    if any(content.startswith(b"JFIF\0") and len(content) >= 14 for content in segments.get(JFIF, ())):
        return True
    told = [content for content in segments.get(ADOBE, ()) if content.startswith(b"Adobe") and len(content) >= 12]
    return told[-1][11] == 1 if told else channels != b"RGB"
