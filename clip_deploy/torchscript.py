"""TorchScript: the traced towers, in float32, in bfloat16 or with dynamic INT8 Linear layers.

`torch.jit.trace` and `quantize_dynamic` are deprecated in PyTorch (torch.export and torchao follow them), and
`torch.jit.script` cannot read transformers' models at all; the report says so.
"""

import warnings
from pathlib import Path

import torch
from torch import nn

from clip_deploy.artifact import Target, read_target
from clip_deploy.checkpoint import load_model
from clip_deploy.config import Precision
from clip_deploy.errors import UnavailableError
from clip_deploy.towers import example_inputs, split

NOTE = "torch.jit.trace, deprecated"
BF16_NOTE = "torch.jit.trace, deprecated; all in bfloat16"
INT8_NOTE = "quantize_dynamic on every Linear, deprecated, saved as TorchScript"


def export_torchscript(checkpoint: Path, precision: Precision, output: Path) -> Target:
    """Trace both towers of `checkpoint` into `output`: vision.pt and text.pt, each loadable without the model's Python.

    Raises UnavailableError where a tower cannot be traced or quantised.
    """
    source = read_target(checkpoint)
    inputs = example_inputs(source.model)
    for name, tower in split(load_model(checkpoint), inputs).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation, said above; tracer warnings: validate checks other shapes
            if precision is Precision.int8:
                tower = _quantized(tower)
            elif precision is Precision.bf16:
                tower = BFloat16(tower).eval()
            traced = _trace(tower, inputs[name])
        torch.jit.save(traced, output / f"{name}.pt")
    return Target(
        runtime="torchscript",
        precision=precision.value,
        files=["vision.pt", "text.pt"],
        model=source.model,
        build={"note": {Precision.int8: INT8_NOTE, Precision.bf16: BF16_NOTE}.get(precision, NOTE)},
    )


class BFloat16(nn.Module):
    """A tower that computes in bfloat16 and takes and gives float32."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower.bfloat16()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.tower(*(value.bfloat16() if value.is_floating_point() else value for value in inputs)).float()


def _quantized(tower: nn.Module) -> nn.Module:
    try:
        return torch.ao.quantization.quantize_dynamic(tower, {nn.Linear}, dtype=torch.qint8)
    except RuntimeError as error:
        raise UnavailableError(f"PyTorch has no INT8 kernels here: {str(error).splitlines()[0]}") from error


def _trace(tower: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.jit.ScriptModule:
    try:
        with torch.inference_mode():
            return torch.jit.freeze(torch.jit.trace(tower, inputs, check_trace=False))
    except (RuntimeError, TypeError) as error:
        raise UnavailableError(f"torch.jit.trace failed: {str(error).splitlines()[0]}") from error
