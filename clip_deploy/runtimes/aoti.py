"""AOTInductor packages: machine code that PyTorch loads without the model's Python or transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch._inductor import aoti_load_package

from clip_deploy.core.artifact import Target
from clip_deploy.runtimes import pytorch


class Encoder(pytorch.Encoder):
    """AOTInductor's compiled towers (.pt2), which run without Python; CUDA graphs on a GPU."""

    graphs = True

    def load(self, folder: Path, target: Target, towers: Sequence[str]) -> dict[str, pytorch.Tower]:
        torch.zeros(1, device=target.device)  # a package loaded before CUDA is initialised ends the process
        single = target.device == "cuda"  # its lock cannot be captured
        return {tower: aoti_load_package(folder / f"{tower}.pt2", run_single_threaded=single) for tower in towers}
