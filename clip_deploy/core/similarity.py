"""How close a target's embeddings are to the untouched FP32 model's."""

from typing import Any

import numpy as np


def similarity(actual: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Cosine of each row with the reference's row (lowest, 1st percentile, mean) and the largest absolute difference.

    Args:
        actual, reference: [rows, dimension], not normalised.

    Returns:
        cosine_min, cosine_p1, cosine_mean, max_abs_diff, and finite: False where a NaN or an infinity was found (the
        cosines then count such a row as 0).
    """
    finite = bool(np.isfinite(actual).all())
    cosines = row_cosines(np.nan_to_num(actual, nan=0.0, posinf=0.0, neginf=0.0), reference)
    return {
        "cosine_min": float(cosines.min()),
        "cosine_p1": float(np.percentile(cosines, 1)),
        "cosine_mean": float(cosines.mean()),
        "max_abs_diff": float(np.abs(actual - reference).max()) if finite else float("nan"),
        "finite": finite,
    }


def row_cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine similarity of each pair of rows, in float64."""
    return (normalized(left) * normalized(right)).sum(axis=1)


def normalized(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, in float64; a row of zeros stays zero."""
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
