"""Towers that PyTorch calls, on a CPU or a GPU: what the runtimes of PyTorch's own formats share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_deploy.core.artifact import TOWERS, Target
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.model import image_feed
from clip_deploy.runtimes import text_feed

MAX_GRAPHS = 16  # shapes whose CUDA graphs are kept; each holds its own activations
WARM_UP = 3  # calls before a capture: libraries choose kernels and take their workspaces

Tower = Callable[..., Tensor]


def is_available(device: str) -> bool:
    """Whether PyTorch can use "cpu" or "cuda" here."""
    return device == "cpu" or torch.cuda.is_available()


def require(device: str) -> None:
    """Raises UnavailableError where PyTorch cannot use the device."""
    if not is_available(device):
        raise UnavailableError("no CUDA device that PyTorch can use")


def _unit(tower: Tower, *inputs: Tensor) -> Tensor:
    return F.normalize(tower(*inputs), dim=-1)


@dataclass
class Graph:
    """A captured call: fill the inputs, replay, read the output."""

    inputs: list[Tensor]
    output: Tensor
    replay: Callable[[], None]


def capture(tower: Tower, inputs: list[Tensor]) -> Graph:
    """Record `tower` on these device tensors as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            tower(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # libraries have threads too
        output = tower(*inputs)
    return Graph(inputs, output, graph.replay)


class Encoder(ABC):
    """Loads nothing itself: subclasses give the towers.

    Attributes:
        graphs: whether each shape's call is recorded once and replayed, where the target runs on a GPU.
        takes_device_tensors: whether encode_images also takes a tensor that is on the GPU already.
    """

    image_input = "pixel_values"
    graphs = False

    def __init__(self, folder: Path, target: Target, threads: int | None, towers: Sequence[str] = TOWERS) -> None:
        require(target.device)
        if threads:
            torch.set_num_threads(threads)
        self.device = target.device
        self.takes_device_tensors = self.device == "cuda"
        self.text_inputs = target.model.text_inputs
        self.captured: dict[tuple[Any, ...], Graph] = {}
        self.towers: dict[str, Tower] = self.load(folder, target, towers)

    @abstractmethod
    def load(self, folder: Path, target: Target, towers: Sequence[str]) -> dict[str, Tower]:
        """The towers by their names, on the target's device."""

    def encode_images(self, images: np.ndarray | Tensor) -> np.ndarray:
        found: np.ndarray = self._encode("vision", list(image_feed(images).values()))
        return found

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def begin_images(self, images: Tensor) -> Callable[[], np.ndarray]:
        """Ask for the embeddings of pixel values that are on the GPU; the call waits for them.

        So the GPU can be asked for the next batch before the host has taken this one's.
        """
        if self._uses_graphs():
            graph = self._graph("vision", [images])
            graph.inputs[0].copy_(images)
            graph.replay()
            output = graph.output
        else:
            output = self.towers["vision"](images)
        held = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        held.copy_(output, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def finish(pixels: Tensor = images) -> np.ndarray:  # which stay until they are read
            done.synchronize()
            found: np.ndarray = held.numpy()
            return found

        return finish

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._encode("text", list(text_feed(self.text_inputs, input_ids, attention_mask).values()))
        return found

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def bind(self, tower: str, arrays: list[np.ndarray]) -> Callable[[], object]:
        """A call on inputs that are on the device already; it does not wait for the result."""
        tensors = [torch.from_numpy(array).to(self.device) for array in arrays]
        if self._uses_graphs():
            return self._graph(tower, tensors).replay
        return partial(torch.inference_mode()(self.towers[tower]), *tensors)

    def normalise(self) -> None:
        """From now on embeddings have unit length: the device makes them so, within the same CUDA graph."""
        self.towers = {name: partial(_unit, tower) for name, tower in self.towers.items()}
        self.captured.clear()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _encode(self, tower: str, arrays: Sequence[np.ndarray | Tensor]) -> np.ndarray:
        tensors = [torch.as_tensor(array) for array in arrays]
        if self._uses_graphs():
            graph = self._graph(tower, tensors)
            for held, tensor in zip(graph.inputs, tensors, strict=True):
                held.copy_(tensor)
            graph.replay()
            replayed: np.ndarray = graph.output.cpu().numpy()
            return replayed
        found: np.ndarray = self.towers[tower](*(tensor.to(self.device) for tensor in tensors)).cpu().numpy()
        return found

    def _uses_graphs(self) -> bool:
        return self.graphs and self.device == "cuda"

    def _graph(self, tower: str, tensors: list[Tensor]) -> Graph:
        key = (tower, *(tensor.shape for tensor in tensors))
        if key not in self.captured:
            if len(self.captured) == MAX_GRAPHS:
                self.captured.pop(next(iter(self.captured)))
            self.captured[key] = capture(self.towers[tower], [tensor.to(self.device).clone() for tensor in tensors])
        return self.captured[key]
