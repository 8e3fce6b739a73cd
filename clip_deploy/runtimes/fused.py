"""Fused ONNX graphs, run on a GPU by PyTorch with our kernels and replayed as CUDA graphs. Needs no transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch

from clip_deploy.core.artifact import Target
from clip_deploy.core.errors import UnavailableError
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.torch_module import GraphModule
from clip_deploy.runtimes import pytorch

DTYPES = {"fp32": torch.float32, "fp16": torch.float32, "bf16": torch.bfloat16}  # a graph in FP16 says so itself


class Encoder(pytorch.Encoder):
    """A fused graph on a GPU, by PyTorch and our kernels, the faster of two for each shape (autotune); CUDA graphs."""

    graphs = True

    def load(self, folder: Path, target: Target, towers: Sequence[str]) -> dict[str, pytorch.Tower]:
        try:
            from clip_deploy.runtimes.autotune import TunedOperators
        except ModuleNotFoundError as error:
            raise UnavailableError(f"{error.name} is not installed: it comes with PyTorch for CUDA") from error
        operators = TunedOperators()
        return {
            tower: GraphModule(onnx_file.load(folder / f"{tower}.onnx"), DTYPES[target.precision], operators).to(
                target.device
            )
            for tower in towers
        }
