"""AOTInductor packages: machine code that PyTorch loads without the model's Python or transformers."""

from pathlib import Path

import numpy as np
import torch
from torch._inductor import aoti_load_package

from clip_deploy.artifact import Target


class Encoder:
    image_input = "pixel_values"

    def __init__(self, folder: Path, target: Target, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.text_inputs = target.model["text_inputs"]
        self.vision, self.text = (aoti_load_package(folder / f"{tower}.pt2") for tower in ("vision", "text"))

    @torch.inference_mode()
    def encode_images(self, images: np.ndarray) -> np.ndarray:
        return self.vision(torch.from_numpy(images)).numpy()

    @torch.inference_mode()
    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.text(*(torch.from_numpy(given[name]) for name in self.text_inputs)).numpy()
