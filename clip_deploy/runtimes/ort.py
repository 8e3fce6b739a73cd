"""ONNX graphs, run by ONNX Runtime's CPU provider. Needs neither torch nor transformers."""

from pathlib import Path

import numpy as np
import onnxruntime

from clip_deploy.artifact import Target


class Encoder:
    def __init__(self, folder: Path, target: Target, threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        if threads:
            options.intra_op_num_threads = threads
        self.vision, self.text = (
            onnxruntime.InferenceSession(folder / f"{tower}.onnx", options, providers=["CPUExecutionProvider"])
            for tower in ("vision", "text")
        )
        self.text_inputs = target.model["text_inputs"]
        self.image_input = target.image_input

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        return self.vision.run(None, {self.image_input: images})[0]

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Probabilities [batch, labels] from a graph with a zero-shot head; images as encode_images takes them."""
        return self.vision.run(["probabilities"], {self.image_input: images})[0]

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.text.run(None, {name: given[name] for name in self.text_inputs})[0]
