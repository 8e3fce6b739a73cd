"""From an RGB image to pixel values, as a checkpoint's own processor does it, with Pillow and numpy alone."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from clip_deploy.core.model import image_dtype

MAX_ASPECT = 500  # of the longer side to the shorter: resizing the shorter one makes a thin image as much larger


@dataclass
class Preprocessing:
    """Resize, centre crop, rescale and normalise, and cut into patches; what a package's preprocessor.json holds.

    Attributes:
        size: {"shortest_edge": pixels}, {"longest_edge": pixels}, {"height": pixels, "width": pixels}, or None where
            nothing is resized.
        crop: [height, width] of the centre crop, or None; what an image lacks is padded.
        resample: Pillow's number of the filter, or None where nothing is resized.
        rescale_factor, image_mean, image_std: pixel_values = (grey level * factor - mean) / std, by channel.
        crop_rounding: where the middle falls on half a pixel: "down" as in transformers, which also pads more before
            an image than behind it, or "even" as in torchvision, to the even one, with more padding behind.
        fill: grey level of the padding.
        patch_size, max_patches: of a model that takes patches of images in their proportions (SigLIP 2 NaFlex): as
            large as fits into max_patches squares of patch_size pixels; size and crop are None then.
    """

    size: dict[str, int] | None
    crop: list[int] | None
    resample: int | None
    rescale_factor: float
    image_mean: list[float]
    image_std: list[float]
    crop_rounding: str = "down"
    fill: int = 0
    patch_size: int | None = None
    max_patches: int | None = None

    @property
    def scale(self) -> np.ndarray:
        """What one grey level is worth in pixel values, float64 [3]."""
        return np.divide(self.rescale_factor, self.image_std)

    @property
    def offset(self) -> np.ndarray:
        """The pixel values of black, float64 [3]."""
        return -np.divide(self.image_mean, self.image_std)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing: the longer side is cut to whole pixels, as transformers and torchvision do.

        Where the longest edge is set, both are rounded, as open_clip does.
        """
        if self.patch_size and self.max_patches:
            return patched_size(height, width, self.patch_size, self.max_patches)
        if self.size is None:
            return height, width
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        if "longest_edge" in self.size:
            ratio = max(height, width) / self.size["longest_edge"]
            return max(1, round(height / ratio)), max(1, round(width / ratio))
        edge, short = self.size["shortest_edge"], min(height, width)
        return edge * height // short, edge * width // short

    def crop_start(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the centre crop; negative where the image is smaller, which is padded there."""
        wanted = self.crop or [height, width]
        return self._start(height, wanted[0]), self._start(width, wanted[1])

    def _start(self, side: int, wanted: int) -> int:
        if self.crop_rounding == "down":
            return (side - wanted) // 2
        return round((side - wanted) / 2) if side >= wanted else -((wanted - side) // 2)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Pixel values of one RGB image, float32 [3, height, width], or the record of its patches, []."""
        if self.resample is not None:
            height, width = self.resized(image.height, image.width)
            image = image.resize((width, height), Image.Resampling(self.resample))
        if self.crop is not None:
            image = self._cropped(image, *self.crop)
        pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")  # contiguous, as the tower takes it
        pixels *= self.scale.astype(np.float32).reshape(3, 1, 1)
        pixels += self.offset.astype(np.float32).reshape(3, 1, 1)
        return to_patches(pixels, self.patch_size, self.max_patches) if self.patch_size and self.max_patches else pixels

    def _cropped(self, image: Image.Image, height: int, width: int) -> Image.Image:
        top, left = self.crop_start(image.height, image.width)
        if self.fill and (image.height < height or image.width < width):
            padded = Image.new("RGB", (width, height), (self.fill,) * 3)
            padded.paste(image, (-left, -top))
            return padded
        return image.crop((left, top, left + width, top + height))


PRECISION = 1e-5  # to which transformers seeks the scale of an image that is cut into patches


def patched_size(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Height and width of an image scaled until it just fits into `max_patches` squares of `patch_size` pixels.

    By the same bisection as transformers' Siglip2ImageProcessor (get_image_size_for_max_num_patches).
    """

    def at(scale: float) -> tuple[int, int]:
        return _whole_patches(height * scale, patch_size), _whole_patches(width * scale, patch_size)

    low, high = PRECISION / 10, 100.0
    while high - low >= PRECISION:
        scale = (low + high) / 2
        if math.prod(at(scale)) <= max_patches * patch_size**2:
            low = scale
        else:
            high = scale
    return at(low)


def _whole_patches(side: float, patch_size: int) -> int:
    return max(patch_size, math.ceil(side / patch_size) * patch_size)


def to_patches(pixels: np.ndarray, patch_size: int, max_patches: int) -> np.ndarray:
    """The record [] of an image [3, height, width] whose sides are whole patches, row by row, padded with zeros."""
    rows, columns = pixels.shape[1] // patch_size, pixels.shape[2] // patch_size
    image = np.zeros((), image_dtype([], [max_patches, 3 * patch_size**2]))
    cut = pixels.reshape(3, rows, patch_size, columns, patch_size).transpose(1, 3, 2, 4, 0)
    image["pixel_values"][: rows * columns] = cut.reshape(rows * columns, -1)
    image["pixel_attention_mask"][: rows * columns] = 1
    image["spatial_shapes"] = rows, columns
    return image


def to_pixels(image: Any) -> np.ndarray:
    """float32 [3, height, width] of an image in a model's image_dtype: to_patches reversed, or as it is."""
    if image.dtype.names is None:
        found: np.ndarray = image
        return found
    rows, columns = image["spatial_shapes"].tolist()
    side = math.isqrt(image["pixel_values"].shape[-1] // 3)
    patches = image["pixel_values"][: rows * columns].reshape(rows, columns, side, side, 3)
    return np.ascontiguousarray(patches.transpose(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side))
