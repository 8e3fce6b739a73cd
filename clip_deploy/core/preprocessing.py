"""From an RGB image to pixel values, as a checkpoint's own processor does it, with Pillow and numpy alone."""

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass
class Preprocessing:
    """Resize, centre crop, rescale and normalise; what a package's preprocessor.json holds.

    Attributes:
        size: {"shortest_edge": pixels}, {"longest_edge": pixels}, {"height": pixels, "width": pixels}, or None where
            nothing is resized.
        crop: [height, width] of the centre crop, or None; what an image lacks is padded.
        resample: Pillow's number of the filter, or None where nothing is resized.
        rescale_factor, image_mean, image_std: pixel_values = (grey level * factor - mean) / std, by channel.
        crop_rounding: where the middle falls on half a pixel: "down" as in transformers, which also pads more before
            an image than behind it, or "even" as in torchvision, to the even one, with more padding behind.
        fill: grey level of the padding.
    """

    size: dict[str, int] | None
    crop: list[int] | None
    resample: int | None
    rescale_factor: float
    image_mean: list[float]
    image_std: list[float]
    crop_rounding: str = "down"
    fill: int = 0

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
        """Pixel values of one RGB image, float32 [3, height, width]."""
        if self.resample is not None:
            height, width = self.resized(image.height, image.width)
            image = image.resize((width, height), Image.Resampling(self.resample))
        if self.crop is not None:
            image = self._cropped(image, *self.crop)
        pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")  # contiguous, as the tower takes it
        pixels *= self.scale.astype(np.float32).reshape(3, 1, 1)
        pixels += self.offset.astype(np.float32).reshape(3, 1, 1)
        return pixels

    def _cropped(self, image: Image.Image, height: int, width: int) -> Image.Image:
        top, left = self.crop_start(image.height, image.width)
        if self.fill and (image.height < height or image.width < width):
            padded = Image.new("RGB", (width, height), (self.fill,) * 3)
            padded.paste(image, (-left, -top))
            return padded
        return image.crop((left, top, left + width, top + height))
