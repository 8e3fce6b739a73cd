"""Triton Python model: image files (JPEG, PNG, WebP...) to what the image tower takes. Needs numpy and Pillow.

Tokens of texts, where they come along, pass through: a step of the ensemble that follows has seen both.

Resize, centre crop, rescaling and normalisation are those of the checkpoint's own processor, read from
preprocessor.json; without that file the tower preprocesses itself, and this model only decodes.
"""

import io
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image, ImageOps, UnidentifiedImageError

with suppress(ImportError):  # where it is installed, HEIC is read too
    import pillow_heif

    pillow_heif.register_heif_opener()

Image.MAX_IMAGE_PIXELS = None  # Pillow only warns; MAX_PIXELS refuses
MAX_BYTES = 20_000_000  # of one file
MAX_PIXELS = 50_000_000  # of one image: a small file can hold a picture that fills the memory
MAX_ASPECT = 500  # of the longer side to the shorter: resizing the shorter one makes a thin image as much larger


# What Pillow's parser raises where EXIF is damaged: that says nothing then.
BROKEN_EXIF = (ArithmeticError, AttributeError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)


class RefusedError(ValueError):
    """A file that is no image, or too large."""


class TritonPythonModel:
    """Files of images, of one size in a request, to what the image tower takes."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.output, *self.tokens = [output["name"] for output in config["output"]]
        self.max_images = int(config["parameters"]["max_images"]["string_value"])
        path = Path(args["model_repository"]) / args["model_version"] / "preprocessor.json"
        self.settings = json.loads(path.read_text()) if path.exists() else None

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        files = pb_utils.get_input_tensor_by_name(request, "encoded").as_numpy().reshape(-1)
        try:
            tensor = pb_utils.Tensor(self.output, self.stacked(files))
        except RefusedError as error:
            refused = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refused)
        given = [pb_utils.get_input_tensor_by_name(request, name) for name in self.tokens]
        passed = [pb_utils.Tensor(token.name(), token.as_numpy()) for token in given if token is not None]
        return pb_utils.InferenceResponse([tensor, *passed])

    def stacked(self, files: np.ndarray) -> np.ndarray:
        """float32 [images, 3, height, width], or uint8 [images, height, width, 3] where the tower preprocesses."""
        if not 1 <= len(files) <= self.max_images:
            raise RefusedError(f"the request has {len(files)} images: give 1 to {self.max_images}")
        if self.settings is not None:  # one by one: decoded, an image takes far more memory than its pixel values
            return np.stack([pixel_values(decoded(content), self.settings) for content in files])
        images = []
        for content in files:
            images.append(np.asarray(decoded(content)))
            if images[-1].shape != images[0].shape:
                raise RefusedError("the images of one request must have one size: send one request for each size")
            if len(images) * images[0][..., 0].size > MAX_PIXELS:
                raise RefusedError(f"the images of one request have more than {MAX_PIXELS} pixels in all: send fewer")
        return np.stack(images)


def decoded(content: bytes) -> Image.Image:
    """An RGB image, turned upright by the orientation that a camera wrote into the file."""
    if len(content) > MAX_BYTES:
        raise RefusedError(f"the file has {len(content)} bytes: at most {MAX_BYTES} are accepted")
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RefusedError(f"the image has {image.width} x {image.height} pixels: at most {MAX_PIXELS} in all")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise RefusedError(
                    f"the image has {image.width} x {image.height} pixels: a side may be at most {MAX_ASPECT} times "
                    "the other"
                )
            image.load()
            with suppress(*BROKEN_EXIF):
                ImageOps.exif_transpose(image, in_place=True)
            return rgb(image)
    except RefusedError:
        raise
    except UnidentifiedImageError as error:
        raise RefusedError("not an image that can be decoded: of no known format (HEIC needs pillow-heif)") from error
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads to
        raise RefusedError(f"not an image that can be decoded: {error}") from error


def rgb(image: Image.Image) -> Image.Image:
    """Of 16 bits of grey the upper 8; what is transparent becomes white."""
    if image.mode in ("I", "F"):
        raise RefusedError(f"the image has pixels of mode {image.mode}, whose range is unknown")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixel_values(image: Image.Image, settings: dict[str, Any]) -> np.ndarray:
    """float32 [3, height, width]."""
    if settings["size"] is not None:
        image = image.resize(resized(image, settings["size"]), Image.Resampling(settings["resample"]))
    if settings["crop"] is not None:
        image = cropped(image, settings)
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")  # contiguous, as the tower takes it
    pixels *= np.divide(settings["rescale_factor"], settings["image_std"]).astype(np.float32).reshape(3, 1, 1)
    pixels -= np.divide(settings["image_mean"], settings["image_std"]).astype(np.float32).reshape(3, 1, 1)
    return pixels


def cropped(image: Image.Image, settings: dict[str, Any]) -> Image.Image:
    """The middle; what the image lacks is padded."""
    height, width = settings["crop"]
    rounding, fill = settings.get("crop_rounding", "down"), settings.get("fill", 0)  # older packages have neither
    top, left = start(image.height, height, rounding), start(image.width, width, rounding)
    if fill and (image.height < height or image.width < width):
        padded = Image.new("RGB", (width, height), (fill,) * 3)
        padded.paste(image, (-left, -top))
        return padded
    return image.crop((left, top, left + width, top + height))


def start(side: int, wanted: int, rounding: str) -> int:
    """Where the middle begins, negative where the side is padded: "down" as transformers does it, "even" open_clip."""
    if rounding == "down":
        return (side - wanted) // 2
    return round((side - wanted) / 2) if side >= wanted else -((wanted - side) // 2)


def resized(image: Image.Image, size: dict[str, int]) -> tuple[int, int]:
    """[width, height] after resizing; the longer side is cut to whole pixels, or both are rounded."""
    if "height" in size:
        return size["width"], size["height"]
    if "longest_edge" in size:
        ratio = max(image.size) / size["longest_edge"]
        return max(1, round(image.width / ratio)), max(1, round(image.height / ratio))
    short, edge = min(image.size), size["shortest_edge"]
    return edge * image.width // short, edge * image.height // short
