"""One module for each format, all behind the same two verbs. A new one is a new file here, named in RUNTIMES."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from clip_deploy.core.artifact import RUNTIMES, TOWERS, Target, read_target
from clip_deploy.core.errors import DeployError, UnavailableError, first_line
from clip_deploy.core.records import Placement

if TYPE_CHECKING:
    from clip_deploy.core.jpeg import Jpeg
    from clip_deploy.core.preprocessing import Preprocessing

T = TypeVar("T")
SPINNING = ("ort",)  # whose threads wait busily for the next call unless told otherwise
MOVABLE = ("eager", "compiled", "ort")  # runtimes whose files are not bound to the device that they were made for


class Encoder(Protocol):
    """An opened target. Embeddings are float32 [batch, dimension], with the projection and not normalised.

    Attributes:
        image_input: what encode_images takes, "pixel_values" or "images".
        text_inputs: those of "input_ids" and "attention_mask" that the model takes.
    """

    image_input: str
    text_inputs: list[str]

    def __init__(self, folder: Path, target: Target, threads: int | None, towers: Sequence[str]) -> None: ...

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """Encode [batch] of the model's image_dtype, or images, uint8 [batch, height, width, 3] in RGB."""
        ...

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Encode int64 [batch, sequence] twice; a model without a mask ignores the second."""
        ...


class DeviceEncoder(Encoder, Protocol):
    """One that runs on a GPU and can be timed without the way there and back."""

    def bind(self, tower: str, arrays: list[np.ndarray]) -> Callable[[], object]:
        """Put a tower's inputs on the GPU; the call runs on them and need not wait for the result."""
        ...

    def wait(self) -> None:
        """Until the GPU has done what was called."""
        ...


@runtime_checkable
class PlacedEncoder(Protocol):
    """One whose library places each node by itself."""

    def placement(self) -> dict[str, Placement]:
        """Of each tower that was called on a GPU: how many nodes each provider runs, and whether as a CUDA graph."""
        ...


class GpuPreprocessing(Protocol):
    """JPEG files as pixel values on a GPU, float32 [rows, 3, height, width]: tensors of PyTorch's.

    Attributes:
        workers: threads that do a batch each, and so keep it busy.
    """

    workers: int

    def __call__(self, jpegs: Sequence["Jpeg | None"]) -> tuple[Any, list[int]]:
        """Of a batch the pixel values, and the rows that are left to `fill`: what the GPU does not decode."""
        ...

    def fill(self, pixels: Any, row: int, found: np.ndarray) -> None:
        """Put a picture's pixel values, float32 [3, height, width], into their row."""
        ...

    def decode(self, jpegs: Sequence["Jpeg | None"]) -> list[Any]: ...

    def preprocess(self, images: Sequence[Any]) -> Any: ...


def open_encoder(
    folder: Path,
    threads: int | None = None,
    device: str | None = None,
    towers: Sequence[str] = TOWERS,
    allow_spinning: bool = True,
) -> Encoder:
    """Open the target in `folder`.

    Args:
        folder: one of artifacts/.
        threads: of the library's pool; None leaves its default.
        device: "cpu" or "cuda" instead of the target's own.
        towers: those that are opened; the other one's files may be missing.
        allow_spinning: whether threads wait busily for the next call, of a runtime that leaves the choice.

    Raises:
        UnavailableError: it could not be built, it is bound to another device, or the library or the device that runs
            it is missing.
        DeployError: the runtime refuses its files.
    """
    target = read_target(folder)
    if target.unavailable:
        raise UnavailableError(target.unavailable)
    if target.runtime not in RUNTIMES:
        raise DeployError(f"{folder} asks for runtime {target.runtime!r}: known are {', '.join(RUNTIMES)}")
    if device not in (None, target.device) and target.runtime not in MOVABLE:
        raise UnavailableError(f"{folder.name} is made for {target.device} and cannot be opened on {device}")
    try:
        module = importlib.import_module(f"clip_deploy.runtimes.{target.runtime}")
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed") from error
    try:
        options = {"allow_spinning": allow_spinning} if target.runtime in SPINNING else {}
        moved = replace(target, device=device or target.device)
        found: Encoder = module.Encoder(folder, moved, threads, towers, **options)
        return found
    except UnavailableError:
        raise
    except Exception as error:  # the runtimes' errors share no base class
        reason = first_line(error)
        raise DeployError(f"{folder.name} does not load: {reason}") from error


def open_gpu_preprocessing(settings: "Preprocessing") -> GpuPreprocessing:
    """Open the GPU's way from JPEG files to pixel values.

    Raises UnavailableError where a library or the GPU is missing, or these settings are not for it.
    """
    try:
        module = importlib.import_module("clip_deploy.runtimes.gpu_preprocessing")
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"the feed gpu needs the library {error.name}, which comes with PyTorch for CUDA: see pytorch.org"
        ) from error
    found: GpuPreprocessing = module.GpuPreprocessing(settings)
    return found


def text_feed(names: Sequence[str], input_ids: T, attention_mask: T) -> dict[str, T]:
    """Of the two, both [batch, sequence], what a text tower takes, by its inputs' names and in their order."""
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    return {name: given[name] for name in names}
