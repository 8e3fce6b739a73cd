"""ONNX graphs through TensorRT inside ONNX Runtime: by its own TensorRT provider, or NVIDIA's plugin of TensorRT-RTX.

As in clip_deploy.runtimes.ort, each shape has a session, with an engine of its own; what TensorRT does not take, ONNX
Runtime's CUDA provider runs.
"""

import functools
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime import InferenceSession

from clip_deploy.core.artifact import TOWERS, Target, real_graph
from clip_deploy.core.errors import UnavailableError
from clip_deploy.runtimes import ort

BUILT_IN, PLUGIN = "TensorrtExecutionProvider", "onnxruntime_ep_nv_tensorrt_rtx"
INSTALL = "pip install tensorrt, or onnxruntime-ep-nv-tensorrt-rtx-cu13"


class Encoder(ort.Encoder):
    """Graphs of ONNX Runtime by TensorRT, which builds an engine for each shape as it is opened."""

    def __init__(self, folder: Path, target: Target, threads: int | None, towers: Sequence[str] = TOWERS) -> None:
        self.devices = find_devices()
        if self.devices:
            self.provider = self.devices[0].ep_name
        else:
            self.provider = BUILT_IN
        super().__init__(folder, target, threads, towers)

    def open_fixed(self, tower: str, shape: dict[str, int], graph: bool) -> InferenceSession:
        switch = str(int(graph))
        if not self.devices:
            return self.open(tower, (BUILT_IN, {"trt_fp16_enable": "1", "trt_cuda_graph_enable": switch}), shape)
        options = self.options(shape)
        options.add_provider_for_devices(self.devices, {"enable_cuda_graph": switch})
        with real_graph(self.folder / f"{tower}.onnx") as path:
            return InferenceSession(path, options)


@functools.cache
def find_devices() -> list[Any]:
    """The plugin's GPUs; none where ONNX Runtime's own provider finds TensorRT.

    Raises UnavailableError where neither is installed, or the plugin sees no GPU.
    """
    if _is_installed("tensorrt") and BUILT_IN in onnxruntime.get_available_providers():
        return []
    if not _is_installed(PLUGIN):
        raise UnavailableError(f"TensorRT for ONNX Runtime is not installed: {INSTALL}")
    plugin = import_module(PLUGIN)
    onnxruntime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == plugin.get_ep_name()]
    if not found:
        raise UnavailableError("ONNX Runtime's TensorRT-RTX plugin sees no GPU")
    return found


def _is_installed(name: str) -> bool:
    try:
        import_module(name)  # it loads the libraries that the provider looks for
    except ImportError:
        return False
    return True
