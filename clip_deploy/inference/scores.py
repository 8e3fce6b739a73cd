"""From cosines to probabilities, as the model itself scores images and texts."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scoring:
    """The entries of a package's manifest that turn cosines into probabilities; CLIP has no bias."""

    logit_scale: float
    logit_bias: float | None
    activation: str

    def probabilities(self, cosines: np.ndarray) -> np.ndarray:
        """Of cosines [images, texts]: a softmax over the texts, or with "sigmoid" each pair by itself."""
        logits = cosines * self.logit_scale + (self.logit_bias or 0.0)
        if self.activation == "sigmoid":
            each: np.ndarray = 1 / (1 + np.exp(-logits))
            return each
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        return shares
