"""Triton Python model: image and text embeddings to probabilities, as the model itself scores pairs. Needs numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Embeddings of images [images, width] and texts [texts, width] to probabilities [images, texts]."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = json.loads(
            (Path(args["model_repository"]) / args["model_version"] / "settings.json").read_text(encoding="utf-8")
        )
        self.scale, self.bias = settings["logit_scale"], settings["logit_bias"] or 0.0
        self.activation = {"softmax": softmax, "sigmoid": sigmoid}[settings["activation"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        names = ("image_embeds", "text_embeds")
        given = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names]
        if not all(map(len, given)):
            why = f"the request has {len(given[0])} images and {len(given[1])} texts: give one of each or more"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(why, pb_utils.TritonError.INVALID_ARG))
        images, texts = map(normalized, given)
        scores = self.activation(self.scale * images @ texts.T + self.bias)
        return pb_utils.InferenceResponse([pb_utils.Tensor("probabilities", scores.astype(np.float32))])


def normalized(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    found: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return found


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the texts."""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: np.ndarray = raised / raised.sum(axis=1, keepdims=True)
    return shares


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Each pair by itself."""
    shares: np.ndarray = 1 / (1 + np.exp(-logits))
    return shares
