"""What vectors with fewer dimensions or fewer bits cost a search: recall against float32 at full width."""

import numpy as np

from clip_deploy.core.records import Recall, StoredVectors, VectorCost
from clip_deploy.core.vectors import BITS, DTYPES, cut, decode, encode, unit
from clip_deploy.data.preprocessed import Prepared, batches
from clip_deploy.evaluate.accuracy import RESAMPLES
from clip_deploy.evaluate.embeddings import Embeddings

PARTS = (1, 2, 4, 8)  # of an embedding's numbers, all and the first half, quarter and eighth are kept
NEAREST = (1, 5, 10)
DECIMALS = 7  # of a cosine: float32 tells no more apart, so what agrees in them ties
QUERIES = 256  # whose cosines are in memory at a time


def stored_vectors(reference: Embeddings, prepared: Prepared, seed: int) -> StoredVectors:
    """Recall@1, @5 and @10 of searches by text among vectors of each width and type, as `embed` writes them.

    A query is a caption, each wording once, or a prompt where there are no captions; what is searched are the set's
    images. The text is cut like the images and stays float32, as in `search`. Recall@k is the share of a query's k
    nearest images by float32 at full width that are among its k nearest of the shortened vectors, averaged over the
    queries.

    Ties: an image that is as near as the k-th at full width counts as one of the k nearest. Of shortened vectors that
    tie for the last places, each has its share of them: what drawing among them would give on average.
    """
    texts, images = unit(_queries(reference, prepared)), unit(reference.images)
    codes = {name: encode(cut(images, width), dtype) for name in _cells(images.shape[1]) for width, dtype in [name]}
    shares = {name: np.empty((len(texts), len(_nearest(len(images))))) for name in codes}
    for rows in batches(len(texts), QUERIES):
        expected = cosines(texts[rows], images)
        for name, code in codes.items():
            found = cosines(cut(texts[rows], name[0]), decode(code))
            for column, k in enumerate(_nearest(len(images))):
                shares[name][rows, column] = share_found(found, expected, k)
    return StoredVectors(
        queries=len(texts),
        of="captions" if len(reference.captions) else "prompts",
        images=len(images),
        dimension=images.shape[1],
        costs=[
            VectorCost(width, dtype, code[0].nbytes, _recalls(shares[width, dtype], seed))
            for (width, dtype), code in codes.items()
        ],
        left_out=_left_out(images.shape[1]),
    )


def _queries(reference: Embeddings, prepared: Prepared) -> np.ndarray:
    """The texts' embeddings, captions of the same words once."""
    _, distinct = np.unique(prepared.caption_text, return_index=True)
    return reference.captions[np.sort(distinct)] if len(distinct) else reference.prompts


def _cells(dimension: int) -> list[tuple[int, str]]:
    """Width and type of all that can be stored, in the table's order."""
    widths = [dimension // part for part in PARTS if dimension % part == 0]
    return [(width, dtype) for width in widths for dtype in DTYPES if dtype != "binary" or width % BITS == 0]


def _left_out(dimension: int) -> list[str]:
    """Why there is nothing of a width, or of signs at a width."""
    odd = [part for part in PARTS if dimension % part]
    signs = [dimension // part for part in PARTS if not dimension % part and dimension // part % BITS]
    return [
        *(f"1/{part} of {dimension} dimensions is not a whole number" for part in odd),
        *(f"binary at {width} dimensions: signs fill bytes, {BITS} in each" for width in signs),
    ]


def _nearest(images: int) -> list[int]:
    """Those of NEAREST at which a search can miss."""
    return [k for k in NEAREST if k < images]


def cosines(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """[texts, images] of unit vectors, rounded to what float32 tells apart."""
    return np.round(texts.astype(np.float64) @ images.astype(np.float64).T, DECIMALS)


def share_found(found: np.ndarray, expected: np.ndarray, k: int) -> np.ndarray:
    """Of each query's k nearest by `expected`, the share that is among its k nearest by `found`; ties as above.

    Args:
        found, expected: cosines [queries, images], with more than k images.
    """
    right, last = expected >= _kth(expected, k), _kth(found, k)
    sure, tied = found > last, found == last
    places = (k - sure.sum(axis=1)) / tied.sum(axis=1)  # of each that ties
    shares: np.ndarray = ((right & sure).sum(axis=1) + (right & tied).sum(axis=1) * places) / k
    return shares


def _kth(scores: np.ndarray, k: int) -> np.ndarray:
    """The k-th highest of each row, [rows, 1]."""
    return np.partition(scores, -k, axis=1)[:, -k, None]


def _recalls(shares: np.ndarray, seed: int) -> dict[int, Recall]:
    """The mean of each column of `shares` [queries, k], in percent, with its 95 % bootstrap interval."""
    found = {}
    for k, column in zip(NEAREST, shares.T, strict=False):
        low, high = _interval(column, seed)
        found[k] = Recall(100 * float(column.mean()), low, high)
    return found


def _interval(shares: np.ndarray, seed: int) -> tuple[float, float]:
    """Of the mean, in percent, resampling the queries. To draw how often each value comes is to draw queries."""
    values, counts = np.unique(shares, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(shares), counts / len(shares), RESAMPLES)
    low, high = np.percentile(drawn @ values / len(shares), [2.5, 97.5])
    return 100 * float(low), 100 * float(high)
