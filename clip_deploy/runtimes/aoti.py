"""AOTInductor packages: machine code that PyTorch loads without the model's Python or transformers."""

from pathlib import Path

import torch
from torch._inductor import aoti_load_package

from clip_deploy.artifact import Target
from clip_deploy.runtimes import torchscript


class Encoder(torchscript.Encoder):
    """Called as TorchScript's towers are; only loading differs."""

    def __init__(self, folder: Path, target: Target, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.text_inputs = target.model["text_inputs"]
        self.vision, self.text = (aoti_load_package(folder / f"{tower}.pt2") for tower in ("vision", "text"))
