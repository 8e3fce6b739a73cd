"""A checkpoint through torch.compile; on a GPU each shape is compiled by itself and replayed as a CUDA graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clip_deploy.checkpoint.plain_modules import WITHOUT_LOOPS, replace_modules
from clip_deploy.core.artifact import Target
from clip_deploy.runtimes import eager, pytorch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SHAPES = 64  # dynamo gives up at 8


class Encoder(eager.Encoder):
    """The checkpoint's own towers, by torch.compile for each shape; CUDA graphs on a GPU."""

    graphs = True

    def load(self, folder: Path, target: Target, towers: Sequence[str]) -> dict[str, pytorch.Tower]:
        torch._dynamo.config.recompile_limit = MAX_SHAPES
        loaded = super().load(folder, target, towers)
        return {name: torch.compile(tower, dynamic=False) for name, tower in loaded.items()}

    def prepare(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Without what reads values on the CPU, which no CUDA graph holds."""
        replace_modules(model, WITHOUT_LOOPS)
        return model
