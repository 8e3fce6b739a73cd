"""The timed process that opens a package: python -m benchmarks.package_worker FOLDER THREADS

Answers as clip_deploy.timing.latency_worker does, from arrays in memory to embeddings of unit length.
"""

from pathlib import Path

import numpy as np

from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.timing.latency_worker import prepare_call, serve


class Opened:
    """A package with the verbs of a target."""

    def __init__(self, folder: Path, threads: int) -> None:
        classifier = ZeroShotClassifier.open(folder, threads=threads)
        towers = classifier.package.encoder.towers
        self.encoder, self.image_input, self.text_inputs = (
            classifier.encoder,
            towers.vision.image_input,
            towers.text.inputs,
        )

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        return self.encoder.encode_images(images)

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        return self.encoder.encode_texts(input_ids, attention_mask)


if __name__ == "__main__":
    serve(Opened, prepare_call)
