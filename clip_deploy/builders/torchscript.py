"""TorchScript: the traced towers, in float32, in bfloat16 or with dynamic INT8 Linear layers.

`torch.jit.trace` and `quantize_dynamic` are deprecated in PyTorch (torch.export and torchao follow them), and
`torch.jit.script` cannot read transformers' models at all; the report says so.
"""

import io
import warnings
from pathlib import Path

import torch
from torch import nn

from clip_deploy.checkpoint.load import load_model
from clip_deploy.checkpoint.towers import CastWrapper, example_inputs, split
from clip_deploy.core.artifact import Target, read_target
from clip_deploy.core.config import Device, Precision
from clip_deploy.core.errors import UnavailableError, first_line
from clip_deploy.runtimes.pytorch import require

NOTE = "torch.jit.trace, deprecated"
HALVES = {Precision.fp16: torch.float16, Precision.bf16: torch.bfloat16}
VERSIONS = ("version", ".data/version")  # the second where an operator asks for a newer format, as exact GELU does
WRITERS_OWN = (*VERSIONS, "byteorder", ".data/serialization_id")  # records that every archive's writer adds
INT8_NOTE = "quantize_dynamic on every Linear, deprecated, saved as TorchScript"


def export_torchscript(checkpoint: Path, precision: Precision, output: Path, device: Device = Device.cpu) -> Target:
    """Trace both towers of `checkpoint` into `output`: vision.pt and text.pt, each loadable without the model's Python.

    Raises UnavailableError where a tower cannot be traced or quantised, or there is no such device.
    """
    require(device.value)
    source = read_target(checkpoint)
    inputs = example_inputs(source.model)
    for name, tower in split(load_model(checkpoint), inputs).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation, said above; tracer warnings: validate checks other shapes
            if precision is Precision.int8:
                tower = _quantized(tower)
            elif precision in HALVES:
                tower = CastWrapper(tower, HALVES[precision]).eval()
            traced = _trace(tower.to(device.value), tuple(tensor.to(device.value) for tensor in inputs[name]))
        _save(traced, output / f"{name}.pt")
    return Target(
        runtime="torchscript",
        precision=precision.value,
        device=device.value,
        files=["vision.pt", "text.pt"],
        model=source.model,
        build={"note": _note(precision)},
    )


def _note(precision: Precision) -> str:
    if precision is Precision.int8:
        return INT8_NOTE
    return f"{NOTE}; all in {str(HALVES[precision]).removeprefix('torch.')}" if precision in HALVES else NOTE


def _quantized(tower: nn.Module) -> nn.Module:
    try:
        return torch.ao.quantization.quantize_dynamic(tower, {nn.Linear}, dtype=torch.qint8)
    except RuntimeError as error:
        raise UnavailableError(f"PyTorch has no INT8 kernels here: {first_line(error)}") from error


def _trace(tower: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.jit.ScriptModule:
    try:
        with torch.inference_mode():
            return torch.jit.freeze(torch.jit.trace(tower, inputs, check_trace=False))
    except (RuntimeError, TypeError) as error:
        raise UnavailableError(f"torch.jit.trace failed: {first_line(error)}") from error


def _save(module: torch.jit.ScriptModule, path: Path) -> None:
    """Write a module without its debug records: they hold the paths of the building machine's libraries.

    Python writes the file: PyTorch's own writer aborts the process where the disk is full.
    """
    stripped = io.BytesIO()
    reader = torch._C.PyTorchFileReader(io.BytesIO(module.save_to_buffer()))
    writer = torch._C.PyTorchFileWriter(stripped)
    records = reader.get_all_records()
    writer.set_min_version(int(reader.get_record(next(name for name in VERSIONS if name in records))))
    for name in records:
        if not name.endswith(".debug_pkl") and name not in WRITERS_OWN:
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    path.write_bytes(stripped.getbuffer())
