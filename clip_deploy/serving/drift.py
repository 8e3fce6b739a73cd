"""Whether live traffic still looks like the golden set: a two-sample test on the embeddings of images or texts.

The statistic is the squared maximum mean discrepancy with a Gaussian kernel as wide as the median distance: zero only
where both distributions are the same. Its threshold comes from the pooled sample, shuffled again and again, so that it
holds for any distribution and any two sizes (Gretton et al., A Kernel Two-Sample Test, JMLR 13, 2012).
"""

import numpy as np

from clip_deploy.core.errors import DataError
from clip_deploy.core.served import Drift
from clip_deploy.core.similarity import normalized

MIN_ROWS = 20  # of each side: below, even a plain drift goes unseen
MAX_ROWS = 1000  # of each side: the kernel has the square of both together
SHUFFLES = 999
LEVEL = 0.01  # share of undrifted samples that are called drifted


def measure_drift(live: np.ndarray, golden: np.ndarray, seed: int = 0) -> Drift:
    """Hold live embeddings against the golden set's; both [rows, dimension], of any length.

    Beyond MAX_ROWS of either, rows are drawn by `seed`.

    Raises DataError where there are too few rows, other dimensions, or NaN.
    """
    rng = np.random.default_rng(seed)
    first, second = (_sample(rows, name, rng) for rows, name in ((live, "live"), (golden, "golden")))
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"live embeddings have {first.shape[1]} dimensions and golden ones {second.shape[1]}: they must come from "
            "the same model"
        )
    kernel = _kernel(np.concatenate([first, second]))
    orders = np.array([np.arange(len(kernel)), *(rng.permutation(len(kernel)) for _ in range(SHUFFLES))])
    found, *chance = _mmd2(kernel, orders < len(first))
    p_value = (1 + sum(value >= found for value in chance)) / (1 + SHUFFLES)
    means = [normalized(rows.mean(axis=0)) for rows in (first, second)]
    return Drift(
        mmd2=float(found),
        threshold=float(np.quantile(chance, 1 - LEVEL)),
        p_value=float(p_value),
        mean_cosine=float(means[0] @ means[1]),
        rows=(len(first), len(second)),
        drifted=bool(p_value <= LEVEL),
    )


def _sample(rows: np.ndarray, name: str, rng: np.random.Generator) -> np.ndarray:
    if rows.ndim != 2 or len(rows) < MIN_ROWS:
        raise DataError(f"{name} embeddings have shape {list(rows.shape)}: give at least {MIN_ROWS} rows")
    if not np.isfinite(rows).all():
        raise DataError(f"{name} embeddings hold NaN or infinities: the server is wrong, whatever its traffic")
    drawn = rows if len(rows) <= MAX_ROWS else rows[rng.choice(len(rows), MAX_ROWS, replace=False)]
    return normalized(drawn)


def _kernel(rows: np.ndarray) -> np.ndarray:
    """Gaussian of the distances, without the diagonal: a row beside itself says nothing."""
    squares = np.maximum(2 - 2 * rows @ rows.T, 0)  # of unit vectors
    others = squares[~np.eye(len(rows), dtype=bool)]
    kernel = np.exp(-squares / max(float(np.median(others)), 1e-12))
    np.fill_diagonal(kernel, 0)
    found: np.ndarray = kernel
    return found


def _mmd2(kernel: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Mean similarity inside one group and inside the other, minus twice the mean between them.

    Args:
        first: bool [divisions, rows], who is in the first group.
    """
    members = first.astype(np.float64)
    count = members[0].sum()
    other = len(kernel) - count
    inside = np.einsum("ij,ij->i", members @ kernel, members)
    across = members @ kernel.sum(axis=1) - inside
    rest = kernel.sum() - inside - 2 * across
    found: np.ndarray = inside / (count * (count - 1)) + rest / (other * (other - 1)) - 2 * across / (count * other)
    return found
