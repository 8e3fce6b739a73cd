"""A checkpoint, run by PyTorch as transformers wrote it. In float32 it is the reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clip_deploy.checkpoint.load import load_model
from clip_deploy.checkpoint.towers import CastWrapper, ImageTower, TextTower
from clip_deploy.core.artifact import Target
from clip_deploy.runtimes import pytorch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Encoder(pytorch.Encoder):
    """The checkpoint's own towers, run by PyTorch in the target's precision."""

    def load(self, folder: Path, target: Target, towers: Sequence[str]) -> dict[str, pytorch.Tower]:
        torch.backends.cudnn.allow_tf32 = False  # so that convolutions are as exact as matmuls are by default
        model, dtype = self.prepare(load_model(folder)).to(target.device), DTYPES[target.precision]
        return {tower: CastWrapper(WRAPPERS[tower](model), dtype).eval() for tower in towers}

    def prepare(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """As it is loaded."""
        return model


WRAPPERS = {"vision": ImageTower, "text": TextTower}
