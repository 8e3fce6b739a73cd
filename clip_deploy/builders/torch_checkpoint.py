"""Targets that are the checkpoint itself, in half precision or for torch.compile."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from clip_deploy.checkpoint.layout import main_files, model_files
from clip_deploy.checkpoint.load import load_model
from clip_deploy.core.artifact import Target, read_target
from clip_deploy.core.config import Device, Precision, TorchConfig

if TYPE_CHECKING:
    pass


def export_torch(checkpoint: Path, settings: TorchConfig, device: Device, output: Path) -> Target:
    """Save the checkpoint in `settings.precision` as safetensors, its configuration and processor beside."""
    import torch

    halves = {Precision.fp16: torch.float16, Precision.bf16: torch.bfloat16}
    source = read_target(checkpoint)
    for name in set(model_files(checkpoint)) - set(source.files):
        shutil.copyfile(checkpoint / name, output / name)
    load_model(checkpoint).to(halves.get(settings.precision, torch.float32)).save_pretrained(output)
    note = (
        "torch.compile for each shape, CUDA graphs"
        if settings.compile
        else f"the checkpoint in {settings.precision.value}"
    )
    return Target(
        runtime="compiled" if settings.compile else "eager",
        precision=settings.precision.value,
        device=device.value,
        files=main_files(output),
        model=source.model,
        build={"note": note},
    )
