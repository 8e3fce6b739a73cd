"""JPEG files as pixel values on a GPU: nvImageCodec decodes a batch, two kernels resize all its images at once.

The GPU's JPEG engines decode; what they refuse, its multiprocessors do, which leave Huffman's code to the CPU. Where
both shared a batch, they were slower than the engines alone (H200, 640 x 480). The kernels do as Pillow does: rows
first, then columns, rounded to grey levels after each, with antialiasing filters. Images differ in size: each has its
place, its strides (by which it is turned upright, too) and its crop in one table.

Source of the library's backends: https://docs.nvidia.com/cuda/nvimagecodec/py_api.html.
"""

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import triton
from PIL import Image
from torch import Tensor

from clip_deploy.core.environment import cores
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.jpeg import FLIPS, LYING, Header, Jpeg, whole_jpeg
from clip_deploy.core.preprocessing import Preprocessing
from clip_deploy.runtimes.pytorch import is_available
from clip_deploy.runtimes.resize_kernels import resize_first, resize_second

LIBRARY = "nvidia.nvimgcodec"
FILTERS = {1: 3, 2: 1, 3: 2}  # Pillow's numbers of lanczos, bilinear and bicubic; half their widths in pixels
DECODERS = 2  # threads that decode a batch each: while one waits for the engines, the other prepares
SMALL = 2**20  # pixels of a picture that is decoded together with all others that are as small
MAX_PIXELS = 2**28  # of one call with larger ones: 0.8 GB
MIN_SIDE = 16  # pixels; decoders differ at the edges, of which smaller pictures are full
ROWS = 4  # that a program of each kernel resizes
COLUMNS_FIRST = int(PIL.__version__.partition(".")[0]) >= 13  # from then on where an image shrinks most in height


class Plan(NamedTuple):
    """How a picture of one size is resized. Pairs are of rows and columns: along the second, lines are resized first.

    Attributes:
        sides, resized: its size before and after.
        start: where the crop begins in what is resized.
        result: the crop's size.
        steps: to the next row and column of the result, in numbers.
        columns_first: whether all pairs are swapped, since Pillow takes the columns first.
    """

    sides: tuple[int, int]
    resized: tuple[int, int]
    start: tuple[int, int]
    result: tuple[int, int]
    steps: tuple[int, int]
    columns_first: bool


class DeviceImage(NamedTuple):
    """A decoded picture in the GPU's memory, RGB, uint8 [height, width, 3] as the file has it.

    Attributes:
        owner: what holds the memory.
        pointer: its address.
        pitch: bytes of a row.
        header: of the file: the upright picture's size.
    """

    owner: Any
    pointer: int
    pitch: int
    header: Header


def strides(header: Header, pitch: int) -> tuple[int, int, int]:
    """Of the upright picture: bytes from the file's first pixel to its own, and to its next row and column."""
    steps = (3, pitch) if header.lies in LYING else (pitch, 3)
    first, turned = 0, list(steps)
    for axis in FLIPS.get(header.lies, ()):
        first += ((header.height, header.width)[axis] - 1) * steps[axis]
        turned[axis] = -steps[axis]
    return first, turned[0], turned[1]


class GpuPreprocessing:
    """What a Preprocessing makes of JPEG files, within about three grey levels, 0.01 on average.

    The same batch gives the same bytes: what decodes a file does not depend on how busy anything is.
    """

    workers = DECODERS

    def __init__(self, settings: Preprocessing) -> None:
        """Raises UnavailableError as check does."""
        check(settings)
        self.resizer = Resizer(settings, torch.device("cuda"))
        self.local = threading.local()  # of each thread its decoders and stream
        sample = BytesIO()
        Image.new("RGB", (64, 64)).save(sample, "jpeg")
        if self.decode([whole_jpeg(sample.getvalue())]) == [None]:
            raise UnavailableError("nvImageCodec does not decode JPEG files: pip install 'clip-deploy[fast-gpu]'")

    def __call__(self, jpegs: Sequence[Jpeg | None]) -> tuple[Tensor, list[int]]:
        """Decode and preprocess a batch, and wait for it.

        Returns float32 [jpegs, 3, height, width] on the GPU, and which rows are for `fill`: of None, and of files that
        are damaged, very small or of a rare kind.
        """
        readable, pixels = _readable(jpegs), self.resizer.empty(len(jpegs))
        thread, left = self._opened(), set(range(len(jpegs)))
        for rows in _groups(readable):
            images = thread.decode({row: readable[row] for row in rows})
            with thread.turn():
                self.resizer(images, pixels)
            thread.wait()
            left -= images.keys()
        return pixels, sorted(left)

    def fill(self, pixels: Tensor, row: int, found: np.ndarray) -> None:
        """Put a picture's pixel values, float32 [3, height, width], into their row."""
        pixels[row] = torch.from_numpy(found)

    def decode(self, jpegs: Sequence[Jpeg | None]) -> list[DeviceImage | None]:
        """Each picture, or None where the CPU reads it, or says why it cannot be read.

        They are valid until the same thread decodes again.
        """
        readable, thread = _readable(jpegs), self._opened()
        found: dict[int, DeviceImage] = {}
        for rows in _groups(readable):
            found |= thread.decode({row: readable[row] for row in rows})
        thread.wait()
        return [found.get(row) for row in range(len(jpegs))]

    def preprocess(self, images: Sequence[DeviceImage]) -> Tensor:
        """Resize, crop, rescale and normalise: float32 [images, 3, height, width]."""
        thread, pixels = self._opened(), self.resizer.empty(len(images))
        with thread.turn():
            self.resizer(dict(enumerate(images)), pixels)
        thread.wait()
        return pixels

    def _opened(self) -> "DecoderThread":
        if not hasattr(self.local, "thread"):
            self.local.thread = DecoderThread()
        found: DecoderThread = self.local.thread
        return found


class DecoderThread:
    """One thread's decoders and its stream."""

    def __init__(self) -> None:
        codec = _codec()
        self.stream = torch.cuda.Stream()
        self.options = codec.DecodeParams(apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB)
        threads = max(1, cores() // DECODERS)
        kinds = codec.BackendKind.HW_GPU_ONLY, codec.BackendKind.HYBRID_CPU_GPU
        self.engines, self.rest = (
            Buffered(codec.Decoder(torch.cuda.current_device(), threads, [codec.Backend(kind)])) for kind in kinds
        )

    def decode(self, jpegs: dict[int, Jpeg]) -> dict[int, DeviceImage]:
        """Pictures by their rows. Small ones are valid until the next are decoded."""
        images = self._called(self.engines, jpegs)
        images |= self._called(self.rest, {row: jpeg for row, jpeg in jpegs.items() if row not in images})
        placed = {row: _placed(image, jpegs[row].header) for row, image in images.items()}
        return {row: image for row, image in placed.items() if image is not None}

    def _called(self, decoder: "Buffered", jpegs: dict[int, Jpeg]) -> dict[int, Any]:
        if not jpegs:
            return {}
        call = decoder if _is_small(next(iter(jpegs.values())).header) else decoder.decoder.decode
        contents = [jpeg.content for jpeg in jpegs.values()]
        images = call(contents, params=self.options, cuda_stream=self.stream.cuda_stream)
        return {row: image for row, image in zip(jpegs, images, strict=True) if image is not None}

    def turn(self) -> Any:
        """A context in which PyTorch works on this thread's stream."""
        return torch.cuda.stream(self.stream)

    def wait(self) -> None:
        self.stream.synchronize()


class Buffered:
    """A decoder that writes into the buffers of its last call: to free one takes longer than to decode a picture."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.held: list[Any] = []

    def __call__(self, jpegs: list[Any], **options: Any) -> list[Any]:
        """Pictures, or None for each that it does not decode."""
        ready = min(len(jpegs), len(self.held))
        found: list[Any] = []
        if ready:
            found += self.decoder.decode(jpegs[:ready], images=self.held[:ready], **options)
        if jpegs[ready:]:
            found += self.decoder.decode(jpegs[ready:], **options)
        self.held = [image for image in found if image is not None] + self.held[ready:]
        return found


def _codec() -> Any:
    """nvImageCodec with nvJPEG alone: its other parts tell the terminal which libraries they lack."""
    spec = find_spec(LIBRARY)
    parts = Path(spec.origin or "").parent / "extensions" if spec else Path()
    if "NVIMGCODEC_EXTENSIONS_PATH" not in os.environ and (found := sorted(parts.glob("libnvjpeg_ext.so*"))):
        folder = Path(tempfile.mkdtemp(prefix="nvimgcodec-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        (folder / found[0].name).symlink_to(found[0])
        os.environ["NVIMGCODEC_EXTENSIONS_PATH"] = str(folder)
    from nvidia import nvimgcodec

    return nvimgcodec


class Resizer:
    """The two kernels, with the settings of one checkpoint."""

    def __init__(self, settings: Preprocessing, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.height, self.width = _result(settings) or (0, 0)
        self.scales = torch.tensor(np.concatenate([settings.scale, settings.offset]), dtype=torch.float32).to(device)
        self.plan = lru_cache(1024)(self._plan)
        self.entries = lru_cache(1024)(self._entries)

    def empty(self, count: int) -> Tensor:
        """Room for pixel values, float32 [count, 3, height, width]."""
        return torch.empty(count, 3, self.height, self.width, device=self.device)

    def __call__(self, images: dict[int, DeviceImage], pixels: Tensor) -> None:
        """Write the pixel values of pictures into their rows."""
        if len(images) == len(pixels):
            self._resize([images[row] for row in range(len(pixels))], pixels)
        elif images:
            made = self.empty(len(images))
            self._resize(list(images.values()), made)
            pixels[torch.tensor(list(images), device=self.device)] = made

    def _resize(self, images: list[DeviceImage], pixels: Tensor) -> None:
        if not images:
            return
        plans = [self.plan(image.header.height, image.header.width) for image in images]
        lines = [plan.sides[0] for plan in plans]
        starts = np.cumsum([0, *lines])
        entries = [
            (image.pointer + offset, *entries, start)
            for image, start in zip(images, starts, strict=False)
            for offset, entries in (self.entries(image.header, image.pitch),)
        ]
        table = torch.from_numpy(np.array(entries, dtype=np.int64).T.copy()).to(self.device)
        count, longest = len(images), triton.next_power_of_2(max(self.height, self.width))
        half = torch.empty(int(starts[-1]) * 3 * longest, dtype=torch.uint8, device=self.device)
        constants = longest, ROWS, FILTERS[self.settings.resample or 2]
        resize_first[(triton.cdiv(max(lines), ROWS), count)](table, half, count, *constants, num_warps=4)
        size, fill = self.height * self.width, float(self.settings.fill)
        resize_second[(triton.cdiv(max(self.height, self.width), ROWS), count, 3)](
            table, half, pixels, self.scales, count, size, fill, *constants, num_warps=4
        )

    def _entries(self, header: Header, pitch: int) -> tuple[int, tuple[int, ...]]:
        """Where a picture begins in its memory, and its column of the table but for the first and the last entry."""
        plan = self.plan(header.height, header.width)
        first, down, across = strides(header, pitch)
        steps = (across, down) if plan.columns_first else (down, across)
        return first, (*steps, *plan.sides, *plan.resized, *plan.start, *plan.result, *plan.steps)

    def _plan(self, height: int, width: int) -> Plan:
        rows, columns = self.settings.resized(height, width)
        start = self.settings.crop_start(rows, columns)
        if COLUMNS_FIRST and height - rows > max(0, 2 * (width - columns)):
            return Plan((width, height), (columns, rows), start[::-1], (self.width, self.height), (1, self.width), True)
        return Plan((height, width), (rows, columns), start, (self.height, self.width), (self.width, 1), False)


def _placed(image: Any, header: Header) -> DeviceImage | None:
    """None where the decoder gave another size than the file's header says."""
    memory = image.__cuda_array_interface__
    height, width, channels = memory["shape"]
    sides = (header.width, header.height) if header.lies in LYING else (header.height, header.width)
    if (height, width) != sides or channels != 3:
        return None
    pitch = memory["strides"][0] if memory["strides"] else 3 * width
    return DeviceImage(image, memory["data"][0], pitch, header)


def _readable(jpegs: Sequence[Jpeg | None]) -> dict[int, Jpeg]:
    """By their rows the files that are for the GPU, as far as their headers tell."""
    return {row: jpeg for row, jpeg in enumerate(jpegs) if jpeg and min(jpeg.header[1:]) >= MIN_SIDE}


def _is_small(header: Header) -> bool:
    return header.height * header.width <= SMALL


def _groups(readable: dict[int, Jpeg]) -> list[list[int]]:
    """Rows that are decoded together: all small pictures, then large ones of MAX_PIXELS together, or one alone."""
    groups: list[list[int]] = [[]]
    room = 0
    for row, (_, header) in readable.items():
        if _is_small(header):
            groups[0].append(row)
            continue
        size = header.height * header.width
        if size > room:
            groups.append([])
            room = MAX_PIXELS
        groups[-1].append(row)
        room -= size
    return groups


def _result(settings: Preprocessing) -> tuple[int, int] | None:
    """Height and width of every result, or None where they depend on the image."""
    if settings.crop is not None:
        height, width = settings.crop
        return height, width
    if settings.size and "height" in settings.size:
        return settings.size["height"], settings.size["width"]
    return None


def check(settings: Preprocessing) -> None:
    """Raise UnavailableError where the GPU feed lacks its library, a GPU, the filter or one size of all results."""
    if not is_available("cuda"):
        raise UnavailableError("the feed gpu needs a CUDA GPU that PyTorch can use: take another feed")
    if not _is_installed(LIBRARY):
        raise UnavailableError(f"the feed gpu needs {LIBRARY}: pip install 'clip-deploy[fast-gpu]'")
    if settings.max_patches or _result(settings) is None:
        raise UnavailableError("the feed gpu makes images of one size, and this checkpoint's differ: take another feed")
    if settings.resample is not None and settings.resample not in FILTERS:
        raise UnavailableError("the feed gpu lacks the filter with which this checkpoint resizes: take another feed")


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
