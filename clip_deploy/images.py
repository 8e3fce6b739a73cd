"""Image files as a vision tower takes them, with Pillow and numpy alone, as the checkpoint's own processor does it."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clip_deploy.core.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MOST_ASPECT = 500  # of the longer side to the shorter: resizing the shorter one makes a thin image as much larger
UNBOUNDED = ("I", "F")  # Pillow's modes without a fixed range: black and white are a matter of opinion


@dataclass
class Preprocessor:
    """A package's preprocessor.json.

    Attributes:
        size: {"shortest_edge": pixels}, {"height": pixels, "width": pixels}, or None where nothing is resized.
        crop: [height, width] of the centre crop, or None.
        resample: Pillow's number of the filter, or None where nothing is resized.
        rescale_factor, image_mean, image_std: pixel_values = (grey level * factor - mean) / std, by channel.
    """

    size: dict[str, int] | None
    crop: list[int] | None
    resample: int | None
    rescale_factor: float
    image_mean: list[float]
    image_std: list[float]

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Pixel values of one RGB image, float32 [3, height, width]."""
        if self.size is not None and self.resample is not None:
            image = image.resize(_resized(self.size, image.size), Image.Resampling(self.resample))
        levels = np.asarray(image) if self.crop is None else _cropped(np.asarray(image), self.crop)
        scale = np.divide(self.rescale_factor, self.image_std)
        offset = -np.divide(self.image_mean, self.image_std)
        return (levels * scale.astype(np.float32) + offset.astype(np.float32)).transpose(2, 0, 1)


def _resized(size: dict[str, int], given: tuple[int, int]) -> tuple[int, int]:
    """Width and height after resizing; the longer side is cut to a whole number, as transformers does."""
    if "height" in size:
        return size["width"], size["height"]
    width, height = (int(size["shortest_edge"] * side / min(given)) for side in given)
    return width, height


def _cropped(levels: np.ndarray, crop: list[int]) -> np.ndarray:
    """The middle; of an odd rest, the larger part is cut after it, and padded with black before it."""
    missing = [max(0, wanted - side) for wanted, side in zip(crop, levels.shape, strict=False)]
    if any(missing):
        levels = np.pad(levels, [*((math.ceil(side / 2), side // 2) for side in missing), (0, 0)])
    top, left = ((side - wanted) // 2 for side, wanted in zip(levels.shape, crop, strict=False))
    return levels[top : top + crop[0], left : left + crop[1]]


def read_image(path: Path) -> Image.Image:
    """Read a picture as RGB, of an animation the first frame.

    As in the checkpoints' own processors, what is transparent becomes white and EXIF's rotation is not applied: a model
    sees what its processor would show it. 16 bits of grey become the upper 8.

    Raises DataError naming a file that is none, is damaged, thinner than MOST_ASPECT, or has more than Pillow's
    MAX_IMAGE_PIXELS.
    """
    try:
        with Image.open(path) as image:
            return rgb(image)
    except DataError as error:
        raise DataError(f"{path} {error}") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet
        raise DataError(f"{path} {_fault(path, error)}") from error


def _fault(path: Path, error: Exception) -> str:
    if not path.exists():
        return "does not exist: check the path"
    if path.is_file() and path.stat().st_size == 0:
        return "is empty: replace or remove it"
    return f"is no readable image ({error or type(error).__name__}): replace or remove it"


def rgb(image: Image.Image) -> Image.Image:
    """Any picture of Pillow as RGB. Raises DataError where that has no one meaning, or it is too large or too thin."""
    most, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if most and pixels > most:  # below twice as many, Pillow only warns
        raise DataError(f"has {pixels:,} pixels, more than {most:,}: shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS")
    if max(image.size) > MOST_ASPECT * min(image.size):
        raise DataError(
            f"is {image.width:,} x {image.height:,} pixels: a side may be at most {MOST_ASPECT} times the other; "
            "crop it"
        )
    if image.mode in UNBOUNDED:
        raise DataError(f"has pixels of mode {image.mode}, whose range is unknown: save it with 8 bits a channel")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
