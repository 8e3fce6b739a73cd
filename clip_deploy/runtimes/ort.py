"""ONNX graphs, run by ONNX Runtime on a CPU or a GPU. Needs neither torch nor transformers.

On a GPU each shape has a session of its own: with the shape fixed, ONNX Runtime computes all that depends on it while
loading, nothing is left for the CPU, and the call can be recorded as a CUDA graph. Inputs and outputs stay on the GPU.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import InferenceSession, OrtValue, SessionOptions

from clip_deploy.core.artifact import TOWERS, Target, real_graph
from clip_deploy.core.errors import UnavailableError, first_line
from clip_deploy.core.model import image_feed
from clip_deploy.core.providers import CPU, CUDA, load_cuda
from clip_deploy.core.records import Placement
from clip_deploy.runtimes import text_feed

MIN_ONNXRUNTIME = (1, 21)  # ONNX Runtime 1.19 and 1.20 attend to the wrong tokens of a masked text, without an error
MAX_SESSIONS = 16  # shapes kept on a GPU, each with its own copy of the weights

ProviderOptions = tuple[str, dict[str, str]]


class Encoder:
    """Graphs of ONNX Runtime, on the CPU or by CUDA. `threads` is of each tower; None leaves it to ONNX Runtime."""

    provider = CUDA  # what must run the nodes on a GPU

    def __init__(
        self,
        folder: Path,
        target: Target,
        threads: int | None,
        towers: Sequence[str] = TOWERS,
        allow_spinning: bool = True,
    ) -> None:
        _refuse_old_runtime(onnxruntime.__version__)
        self.folder, self.threads, self.allow_spinning = folder, threads, allow_spinning
        self.text_inputs = target.model.text_inputs
        self.image_input = target.image_input
        preprocesses = self.image_input == "images"
        self.names = {"vision": ["images"] if preprocesses else target.model.image_inputs, "text": self.text_inputs}
        self.fixed: dict[tuple[Any, ...], FixedCall] = {}
        self.on_gpu = target.device == "cuda"
        if self.on_gpu:
            load_cuda()
            self.sessions: dict[str, InferenceSession] = {}
        else:
            self.sessions = {tower: self.open(tower, (CPU, {})) for tower in towers}

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        return self._run("vision", list(image_feed(images).values()))

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Probabilities [batch, labels] from a graph with a zero-shot head; images as encode_images takes them."""
        found: np.ndarray = self._session("vision").run(["probabilities"], {self.image_input: images})[0]
        return found

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        return self._run("text", list(text_feed(self.text_inputs, input_ids, attention_mask).values()))

    def bind(self, tower: str, arrays: list[np.ndarray]) -> Callable[[], object]:
        """A call on inputs that are on the GPU already; ONNX Runtime waits for the result itself."""
        return self._fixed(tower, arrays)

    def placement(self) -> dict[str, Placement]:
        """Of each tower that was called on a GPU: how many nodes each provider runs, and whether as a CUDA graph."""
        return {key[0]: Placement(call.nodes, call.graph) for key, call in self.fixed.items()}

    def wait(self) -> None:
        """Nothing is left to wait for."""

    def _run(self, tower: str, arrays: list[np.ndarray]) -> np.ndarray:
        if self.on_gpu and not self._has_too_many_sizes(tower, arrays):
            return self._fixed(tower, arrays).encode(arrays)
        found: np.ndarray = self._session(tower).run(None, dict(zip(self.names[tower], arrays, strict=True)))[0]
        return found

    def _session(self, tower: str) -> InferenceSession:
        """One for every shape."""
        if tower not in self.sessions:
            self.sessions[tower] = self.open(tower, (CUDA, {}))
        return self.sessions[tower]

    def _has_too_many_sizes(self, tower: str, arrays: list[np.ndarray]) -> bool:
        """Whether these are images of one more size, which would each drive out the session of another."""
        is_known = (tower, *(array.shape for array in arrays)) in self.fixed
        return self.names[tower] == ["images"] and len(self.fixed) >= MAX_SESSIONS and not is_known

    def open(self, tower: str, provider: ProviderOptions, shape: dict[str, int] | None = None) -> InferenceSession:
        with real_graph(self.folder / f"{tower}.onnx") as path:
            return InferenceSession(path, self.options(shape), providers=[provider])

    def open_fixed(self, tower: str, shape: dict[str, int], graph: bool) -> InferenceSession:
        """A session for one shape on a GPU, to be recorded as a CUDA graph or not."""
        return self.open(tower, (CUDA, {"enable_cuda_graph": str(int(graph))}), shape)

    def options(self, shape: dict[str, int] | None) -> SessionOptions:
        options = SessionOptions()
        if self.threads:
            options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.allow_spinning)))
        for axis, length in (shape or {}).items():
            options.add_free_dimension_override_by_name(axis, length)
        if self.on_gpu:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return options

    def _fixed(self, tower: str, arrays: list[np.ndarray]) -> "FixedCall":
        key = (tower, *(array.shape for array in arrays))
        if key not in self.fixed:
            if len(self.fixed) == MAX_SESSIONS:
                self.fixed.pop(next(iter(self.fixed)))
            sizes = {"text": ["sequence"], "vision": ["height", "width"] if self.image_input == "images" else []}
            axes = dict(zip(["batch", *sizes[tower]], arrays[0].shape, strict=False))
            inputs = dict(zip(self.names[tower], arrays, strict=True))
            self.fixed[key] = FixedCall(partial(self.open_fixed, tower, axes), self.provider, inputs)
        return self.fixed[key]


class FixedCall:
    """One tower at one shape, its inputs and output bound to memory on the GPU.

    Attributes:
        graph: whether it is replayed as a CUDA graph.
        nodes: how many nodes each provider runs.
    """

    def __init__(
        self, open_session: Callable[[bool], InferenceSession], provider: str, inputs: dict[str, np.ndarray]
    ) -> None:
        try:
            self.session, self.graph = open_session(True), True
        except Exception as error:  # a class of its own for each code, in a private module
            if "NOT_IMPLEMENTED" in str(error):
                raise UnavailableError(f"ONNX Runtime has no kernel for it: {first_line(error)}") from error
            if "graph capture" not in str(error):
                raise
            self.session, self.graph = open_session(False), False  # for a node that the GPU cannot run
        if self.session.get_providers()[0] != provider:
            raise UnavailableError(f"ONNX Runtime's {provider} does not load here: it fell back to another")
        self.nodes = count_nodes(self.session)
        self.binding = self.session.io_binding()
        self.inputs = {name: OrtValue.ortvalue_from_numpy(array, "cuda", 0) for name, array in inputs.items()}
        for given in self.session.get_inputs():
            self.binding.bind_ortvalue_input(given.name, self.inputs[given.name])
        output = self.session.get_outputs()[0]
        rows = next(iter(inputs.values())).shape[0]
        self.output = OrtValue.ortvalue_from_shape_and_type([rows, output.shape[1]], np.float32, "cuda", 0)
        self.binding.bind_ortvalue_output(output.name, self.output)

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def encode(self, arrays: list[np.ndarray]) -> np.ndarray:
        for held, array in zip(self.inputs.values(), arrays, strict=True):
            held.update_inplace(np.ascontiguousarray(array))
        self()
        found: np.ndarray = self.output.numpy()
        return found


def _refuse_old_runtime(version: str) -> None:
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_ONNXRUNTIME:
        least = ".".join(map(str, MIN_ONNXRUNTIME))
        raise UnavailableError(
            f"onnxruntime is {version}: from {least} on it computes fused texts right; "
            f"pip install 'onnxruntime>={least}'"
        )


def count_nodes(session: InferenceSession) -> dict[str, int]:
    """Nodes of the optimised graph by the provider that runs them."""
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts
