"""Ways from JPEG bytes to what an image tower takes: decoding, and the checkpoint's own resize, crop and normalisation.

Each feed works on a list of images, so that one job of a pool can be an image (CPU) or a batch (GPU).
"""

import io
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from clip_deploy.core import fast_preprocessing
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.core.fast_preprocessing import Decoded, FastPreprocessing
from clip_deploy.core.jpeg import FLIPS, LYING, orientation, whole_jpeg
from clip_deploy.runtimes import open_gpu_preprocessing

if TYPE_CHECKING:
    import torch

    from clip_deploy.core.preprocessing import Preprocessing

FEEDS = {"pixel_values": ("pil", "fast", "torchvision", "nvjpeg", "gpu"), "images": ("graph",)}  # by what a tower takes


class Feed(Protocol):
    """Attributes: batch_workers: that do a whole batch each; where it is 0, a job is one image."""

    batch_workers: int

    def decode(self, jpegs: list[bytes]) -> list[Any]:
        """RGB images, in whatever form preprocess takes them."""
        ...

    def preprocess(self, images: list[Any]) -> Any:
        """What the encoder takes of these images: pixel_values or images, as clip_deploy.runtimes.Encoder says."""
        ...


def check_feed(name: str, settings: "Preprocessing") -> None:
    """Raise UnavailableError where a library or the GPU that the feed needs is missing; loads no library for it."""
    if name == "fast":
        fast_preprocessing.check(settings)
    if name == "gpu":
        open_gpu_preprocessing(settings)
    if name not in ("torchvision", "nvjpeg"):
        return
    if settings.max_patches:
        raise UnavailableError("only pil and fast cut images in their proportions into patches (NaFlex)")
    if find_spec("torchvision") is None:
        raise UnavailableError("torchvision is not installed (pip install torchvision)")
    if name == "nvjpeg":
        import torch

        if not torch.cuda.is_available():
            raise UnavailableError("PyTorch sees no CUDA GPU")


def open_feed(name: str, settings: "Preprocessing", device_tensors: bool) -> Feed:
    """Open one of FEEDS.

    Args:
        settings: the checkpoint's own image processor.
        device_tensors: whether the encoder takes tensors of the GPU; otherwise nvjpeg and gpu copy theirs to the host.
    """
    opened: dict[str, Callable[[], Feed]] = {
        "pil": lambda: PilFeed(settings),
        "fast": lambda: FastFeed(settings),
        "graph": GraphFeed,
        "torchvision": lambda: TorchFeed(settings, "cpu", False),
        "nvjpeg": lambda: TorchFeed(settings, "cuda", device_tensors),
        "gpu": lambda: GpuFeed(settings, device_tensors),
    }
    return opened[name]()


def decode_rgb(jpeg: bytes) -> Image.Image:
    """Upright, as EXIF says."""
    with Image.open(io.BytesIO(jpeg)) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return image if image.mode == "RGB" else image.convert("RGB")


def upright(image: "torch.Tensor", lies: int) -> "torch.Tensor":
    """A picture [3, height, width] turned as Pillow's exif_transpose does: torchvision does it on the CPU alone."""
    image = image.transpose(-2, -1) if lies in LYING else image
    return image.flip([axis - 2 for axis in FLIPS[lies]]) if lies in FLIPS else image


class PilFeed:
    """Pillow, which the checkpoint's processor calls too. It decodes and resizes without holding Python's lock."""

    batch_workers = 0

    def __init__(self, settings: "Preprocessing") -> None:
        self.settings = settings

    def decode(self, jpegs: list[bytes]) -> list[Image.Image]:
        return [decode_rgb(jpeg) for jpeg in jpegs]

    def preprocess(self, images: list[Image.Image]) -> np.ndarray:
        return np.stack([self.settings(image) for image in images])


class FastFeed:
    """What `embed --feed fast` does: libjpeg-turbo and a SIMD resize, and Pillow for what they leave to it."""

    batch_workers = 0

    def __init__(self, settings: "Preprocessing") -> None:
        self.settings, self.fast = settings, FastPreprocessing(settings)

    def decode(self, jpegs: list[bytes]) -> list[Decoded | Image.Image]:
        return [self.fast.decode(jpeg) or decode_rgb(jpeg) for jpeg in jpegs]

    def preprocess(self, images: list[Decoded | Image.Image]) -> np.ndarray:
        return np.stack([self._pixels(image) for image in images])

    def _pixels(self, image: Decoded | Image.Image) -> np.ndarray:
        return self.settings(image) if isinstance(image, Image.Image) else self.fast.preprocess(image)


class GraphFeed:
    """Pillow decodes; the target's own graph does the rest."""

    batch_workers = 0

    def decode(self, jpegs: list[bytes]) -> list[np.ndarray]:
        return [np.asarray(decode_rgb(jpeg)) for jpeg in jpegs]

    def preprocess(self, images: list[np.ndarray]) -> np.ndarray:
        return np.stack(images)


class TorchFeed:
    """torchvision, on the CPU or (nvJPEG) on the GPU, where a whole batch is decoded at once."""

    def __init__(self, settings: "Preprocessing", device: str, device_tensors: bool) -> None:
        import torch

        self.settings, self.device, self.device_tensors = settings, device, device_tensors
        self.batch_workers = 1 if device == "cuda" else 0
        self.scale, self.offset = (
            torch.tensor(part, dtype=torch.float32, device=device).reshape(3, 1, 1)
            for part in (settings.scale, settings.offset)
        )

    def decode(self, jpegs: list[bytes]) -> list[Any]:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        encoded = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
        decoded = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self.device)
        images = [upright(image, orientation(jpeg)) for image, jpeg in zip(decoded, jpegs, strict=True)]
        self._wait()
        return images

    def preprocess(self, images: list[Any]) -> Any:
        import torch

        pixels = torch.stack([self._pixels(image) for image in images])
        self._wait()
        return pixels if self.device_tensors else pixels.cpu().numpy()

    def _pixels(self, image: Any) -> Any:
        from torchvision.transforms.v2 import InterpolationMode, functional

        if self.settings.resample is not None:
            size = self.settings.resized(*image.shape[-2:])
            filters = {2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}  # Pillow's numbers
            image = functional.resize(image, list(size), filters[self.settings.resample], antialias=True)
        if self.settings.crop is not None:
            top, left = self.settings.crop_start(*image.shape[-2:])
            sides = zip(self.settings.crop, image.shape[-2:], strict=True)
            below, right = (max(0, want - side) for want, side in sides)
            if below or right:  # what the image lacks, and more, which is cut again; functional.crop knows black alone
                image = functional.pad(image, [max(0, -left), max(0, -top), right, below], fill=self.settings.fill)
                top, left = max(0, top), max(0, left)
            image = functional.crop(image, top, left, *self.settings.crop)
        return image * self.scale + self.offset

    def _wait(self) -> None:
        """The encoder may run on another stream, and a clock that does not wait measures the launch."""
        import torch

        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()


class GpuFeed:
    """What `embed --feed gpu` does: nvImageCodec, and kernels that resize a whole batch."""

    def __init__(self, settings: "Preprocessing", device_tensors: bool) -> None:
        self.preprocessing, self.device_tensors = open_gpu_preprocessing(settings), device_tensors
        self.batch_workers = self.preprocessing.workers

    def decode(self, jpegs: list[bytes]) -> list[Any]:
        """Raises DeployError where nvImageCodec refuses one."""
        images = self.preprocessing.decode([whole_jpeg(jpeg) for jpeg in jpegs])
        if None in images:
            raise DeployError("nvImageCodec does not decode these photos")
        return images

    def preprocess(self, images: list[Any]) -> Any:
        pixels = self.preprocessing.preprocess(images)
        return pixels if self.device_tensors else pixels.cpu().numpy()
