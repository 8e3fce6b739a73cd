"""Embeddings as people store them: fewer dimensions, and fewer bits of each."""

from typing import Any

import numpy as np

from clip_deploy.core.errors import DataError

DTYPES = ("float32", "float16", "int8", "binary")
LEVELS = 127  # of int8, on either side of 0
BITS = 8  # of binary in a byte, the first in its highest


def check_width(dimensions: int | None, dimension: int, dtype: str) -> int:
    """How many of an embedding's `dimension` numbers are kept; None is all.

    Raises DataError where it has not so many, or binary does not fill its bytes.
    """
    kept = dimension if dimensions is None else dimensions
    if not 1 <= kept <= dimension:
        raise DataError(f"dimensions is {kept}: the package's embeddings have {dimension}, give 1 to {dimension}")
    if dtype == "binary" and kept % BITS:
        raise DataError(f"dimensions is {kept}: binary keeps {BITS} in a byte, give a multiple of {BITS}")
    return kept


def cut(embeddings: np.ndarray, width: int) -> np.ndarray:
    """The first `width` numbers of each row [rows, dimension], of unit length again."""
    if width == embeddings.shape[-1]:
        return embeddings
    return unit(embeddings[..., :width])


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows [rows, width] of unit length; one of zeros stays."""
    lengths = np.sqrt(np.vecdot(rows, rows))  # half the time of np.linalg.norm
    found: np.ndarray = rows / np.maximum(lengths[..., None], 1e-12)
    return found


def encode(embeddings: np.ndarray, dtype: str) -> np.ndarray:
    """float32 [rows, width] of unit length as one of DTYPES.

    int8 is [rows, width]: each row by itself, its largest number 127, so that a row keeps its direction and not its
    length. binary is uint8 [rows, width / 8]: the signs, a bit of 1 for a number above 0.
    """
    found: np.ndarray
    if dtype == "binary":
        found = np.packbits(embeddings > 0, axis=-1)
    elif dtype == "int8":
        largest = np.maximum(np.abs(embeddings).max(axis=-1, keepdims=True, initial=0), 1e-12)
        found = np.rint(embeddings / largest * LEVELS).astype(np.int8)
    else:
        found = embeddings.astype(dtype)
    return found


def decode(rows: np.ndarray) -> np.ndarray:
    """What `encode` gave, as float32 [rows, width] of unit length: its dtype tells which it is."""
    if rows.dtype == np.uint8:
        return unit(np.unpackbits(rows, axis=-1).astype(np.float32) * 2 - 1)
    found = rows.astype(np.float32)
    return unit(found) if rows.dtype == np.int8 else found


def read_vectors(table: Any) -> np.ndarray:
    """Column `embedding` of a pyarrow table, decoded: float32 [rows, width]; [0, 0] where it has no rows."""
    flat = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return decode(flat.reshape(table.num_rows, len(flat) // max(1, table.num_rows)))
