"""Fused ONNX graphs, run on a GPU by PyTorch with our kernels and replayed as CUDA graphs. Needs no transformers.

On a CPU PyTorch's own operators run them, and FP8 is simulated.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from clip_deploy.core.artifact import Target
from clip_deploy.core.errors import UnavailableError
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.torch_module import GraphModule, Operators
from clip_deploy.runtimes import pytorch

DTYPES = {"fp32": torch.float32, "fp16": torch.float32, "fp8": torch.float32, "bf16": torch.bfloat16}  # FP16: by itself
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


class Encoder(pytorch.Encoder):
    """A fused graph on a GPU, by PyTorch and our kernels, the faster of two for each shape (autotune); CUDA graphs."""

    graphs = True

    def load(self, folder: Path, target: Target, towers: Sequence[str]) -> dict[str, pytorch.Tower]:
        require_fp8(target)
        operators = _tuned() if target.device == "cuda" else Operators()
        return {
            tower: GraphModule(onnx_file.load(folder / f"{tower}.onnx"), DTYPES[target.precision], operators).to(
                target.device
            )
            for tower in towers
        }


def require_fp8(target: Target) -> None:
    """Raises UnavailableError where the target is in FP8 and the GPU has no units for it."""
    if target.precision == "fp8" and target.device == "cuda":
        found = torch.cuda.get_device_capability()
        if found < FP8_CAPABILITY:
            raise UnavailableError(
                f"{torch.cuda.get_device_name()} has no FP8 units (compute capability {found[0]}.{found[1]}; they come "
                "with 8.9, Ada and Hopper)"
            )


def _tuned() -> Operators:
    try:
        from clip_deploy.runtimes.autotune import TunedOperators
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{error.name} is not installed: it comes with PyTorch for CUDA") from error
    return TunedOperators()
