"""JPEG files as pixel values with libjpeg-turbo and a SIMD resize: faster than Pillow, and about a grey level off.

Two libraries do the work, both without Python's lock: simplejpeg decodes, cykooz_resizer (Rust's fast_image_resize, of
the same filters as Pillow's, in the other order of rows and columns) resizes what the crop keeps. A photo of more than
twice the wanted size is decoded at a half or a quarter of it, as libjpeg does within its DCT: about a grey level off on
average. libjpeg's fast DCT and plain upsampling are left alone: the one overflows, the other bleeds colours.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.jpeg import FLIPS, read_header, upright
from clip_deploy.core.preprocessing import Preprocessing, to_patches

LIBRARIES = ("simplejpeg", "cykooz_resizer")
FILTERS = {1: "lanczos3", 2: "bilinear", 3: "catmull_rom"}  # Pillow's numbers; its bicubic is Catmull and Rom's
SCALES = (4, 2)  # that libjpeg-turbo decodes with SIMD; at 8 it takes the mean of 8 x 8 pixels, which is too coarse
PLANS = 1024  # sizes of photos that are remembered


@dataclass(frozen=True)
class Plan:
    """How a photo of one size is resized and cropped. Pairs are of rows and columns.

    Attributes:
        scale: it is decoded at 1/scale of its size.
        options: cykooz_resizer's, or None where there is nothing to resize.
        made: size of what is resized.
        cut, kept: where in that the crop begins, and what it keeps.
        place, size: where that stands in the result, and the result's size; they differ where the crop pads.
    """

    scale: int
    options: Any
    made: tuple[int, int]
    cut: tuple[int, int]
    kept: tuple[int, int]
    place: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Decoded:
    """RGB, uint8 [height, width, 3] and upright, at the scale of its plan."""

    pixels: np.ndarray
    plan: Plan


class FastPreprocessing:
    """What a Preprocessing makes of JPEG files, within about a grey level on average."""

    def __init__(self, settings: Preprocessing) -> None:
        """Raises UnavailableError where a library is missing, or these settings are not for it."""
        check(settings)
        self.settings = settings
        self.local = threading.local()  # of each thread a resizer, which holds its own buffers and one lock
        self.plan: Callable[[int, int, int], Plan] = lru_cache(PLANS)(self._plan)

    def __call__(self, jpeg: bytes) -> np.ndarray | None:
        """Pixel values as Preprocessing gives them, or None where decode does."""
        image = self.decode(jpeg)
        return None if image is None else self.preprocess(image)

    def decode(self, jpeg: bytes) -> Decoded | None:
        """Decode as small as the result allows, and turn upright as EXIF says.

        None where the file is for Pillow to read or to refuse: none, damaged, of rare colours, too large or too thin.
        """
        import simplejpeg

        if (header := read_header(jpeg)) is None:
            return None
        plan = self.plan(header.height, header.width, header.lies)
        sides = -(-header.height // plan.scale), -(-header.width // plan.scale)
        least = dict(zip(("min_height", "min_width"), header.as_stored(*sides), strict=True)) if plan.scale > 1 else {}
        try:
            pixels = simplejpeg.decode_jpeg(jpeg, **least)
        except Exception:  # of whatever is wrong, Pillow's own reading says it
            return None
        pixels = upright(pixels, header.lies)
        return Decoded(pixels, plan) if pixels.shape[:2] == sides else None

    def preprocess(self, image: Decoded) -> np.ndarray:
        """Resize, crop, rescale and normalise, and cut into patches."""
        settings = self.settings
        levels = self._resized(image)
        pixels = levels.transpose(2, 0, 1).astype(np.float32, order="C")
        pixels *= settings.scale.astype(np.float32).reshape(3, 1, 1)
        pixels += settings.offset.astype(np.float32).reshape(3, 1, 1)
        if settings.patch_size and settings.max_patches:
            return to_patches(pixels, settings.patch_size, settings.max_patches)
        return pixels

    def _resized(self, image: Decoded) -> np.ndarray:
        """Grey levels [height, width, 3] of the result."""
        import cykooz_resizer as resizer

        plan, pixels = image.plan, image.pixels
        if plan.options is not None:
            if not hasattr(self.local, "resizer"):
                self.local.resizer = resizer.Resizer()
            source = resizer.ImageData(pixels.shape[1], pixels.shape[0], resizer.PixelType.U8x3, pixels.tobytes())
            target = resizer.ImageData(plan.made[1], plan.made[0], resizer.PixelType.U8x3)
            self.local.resizer.resize(source, target, plan.options)
            pixels = np.frombuffer(target.get_buffer(), np.uint8).reshape(*plan.made, 3)
        pixels = _window(pixels, plan.cut, plan.kept)
        if plan.kept == plan.size:
            return pixels
        padded = np.full((*plan.size, 3), self.settings.fill, np.uint8)
        _window(padded, plan.place, plan.kept)[...] = pixels
        return padded

    def _plan(self, height: int, width: int, lies: int) -> Plan:
        """Of a photo that has so many rows and columns when it is upright."""
        rows, columns = self.settings.resized(height, width)
        scale = next((by for by in SCALES if height > rows * by and width > columns * by), 1)
        top, left = self.settings.crop_start(rows, columns)
        height_wanted, width_wanted = self.settings.crop or (rows, columns)
        size = height_wanted, width_wanted
        first = max(0, top), max(0, left)
        kept = min(rows, top + size[0]) - first[0], min(columns, left + size[1]) - first[1]
        place = first[0] - top, first[1] - left
        if (rows, columns) == (height, width):
            return Plan(1, None, (rows, columns), first, kept, place, size)
        by = height / scale / rows, width / scale / columns
        if min(by) <= 1:  # fast_image_resize 6.1 enlarges a crop wrongly, and reads behind its buffer
            return Plan(1, self._options(None), (rows, columns), first, kept, place, size)
        flipped = FLIPS.get(lies, ())
        box = [
            self._span(side / scale, axis in flipped, first[axis] * by[axis], kept[axis] * by[axis])
            for axis, side in enumerate((height, width))
        ]
        return Plan(scale, self._options(box), kept, (0, 0), kept, place, size)

    @staticmethod
    def _span(side: float, flipped: bool, begin: float, length: float) -> tuple[float, float]:
        """Begin and length along one axis, in decoded pixels, of which libjpeg adds the last one in part."""
        begin += math.ceil(side) - side if flipped else 0
        return begin, min(length, math.ceil(side) - begin)

    def _options(self, box: list[tuple[float, float]] | None) -> Any:
        """Args: box: begin and length of the rows and the columns that are resized, in decoded pixels; None: all."""
        import cykooz_resizer as resizer

        name = FILTERS[self.settings.resample or 0]
        options = resizer.ResizeOptions(
            resize_alg=resizer.ResizeAlg.convolution(getattr(resizer.FilterType, name)), use_alpha=False
        )
        if box:
            (top, height), (left, width) = box
            options.crop_box = resizer.CropBox(left, top, width, height)
        return options


def _window(pixels: np.ndarray, start: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    return pixels[start[0] : start[0] + size[0], start[1] : start[1] + size[1]]


def check(settings: Preprocessing) -> None:
    """Raise UnavailableError where a library of the fast feed is missing, or it lacks the filter; loads no library."""
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        names = " and ".join(missing)
        raise UnavailableError(f"the fast feed needs {names}: pip install 'clip-deploy[fast]'")
    if settings.resample is not None and settings.resample not in FILTERS:
        name = Image.Resampling(settings.resample).name.lower()
        raise UnavailableError(
            f"this checkpoint resizes with the filter {name}, which the fast feed lacks: take the feed exact"
        )
