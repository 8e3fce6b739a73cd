"""TorchScript archives, run by PyTorch without transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch

from clip_deploy.core.artifact import Target
from clip_deploy.runtimes import pytorch


class Encoder(pytorch.Encoder):
    """Towers of TorchScript (.pt), whose code is in the file."""

    def load(self, folder: Path, target: Target, towers: Sequence[str]) -> dict[str, pytorch.Tower]:
        return {tower: torch.jit.load(folder / f"{tower}.pt", map_location=target.device).eval() for tower in towers}
