"""The checkpoint itself, run by PyTorch as transformers wrote it: the reference."""

from pathlib import Path

import numpy as np
import torch

from clip_deploy.artifact import Target
from clip_deploy.checkpoint import load_model


class Encoder:
    image_input = "pixel_values"

    def __init__(self, folder: Path, target: Target, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.text_inputs = target.model["text_inputs"]
        self.model = load_model(folder)

    @torch.inference_mode()
    def encode_images(self, images: np.ndarray) -> np.ndarray:
        return self.model.get_image_features(pixel_values=torch.from_numpy(images)).pooler_output.numpy()

    @torch.inference_mode()
    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs = {name: torch.from_numpy(given[name]) for name in self.text_inputs}
        return self.model.get_text_features(**inputs).pooler_output.numpy()
