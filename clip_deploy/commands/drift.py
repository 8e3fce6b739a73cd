"""Compare a sample of live embeddings with the golden set: has the input changed?

A sample is one of these: a .npy file of embeddings [rows, dimension]; a .npz file with them under `images`, for example
artifacts/data/evaluation/reference.npz; a folder of .npy files, which ZeroShotClassifier.open(..., sample_folder=...)
writes; Parquet with a column `embedding` (a file, a folder or a URI), which `clip-deploy embed` writes.
Exit code 0: no drift. 3: drift.

example: clip-deploy drift live artifacts/data/evaluation/reference.npz
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from clip_deploy.core.errors import DataError, DeployError, first_line
from clip_deploy.core.vectors import read_vectors
from clip_deploy.inference.storage import TABLE, local, read_tables, shown
from clip_deploy.serving.drift import measure_drift

DRIFTED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("live", metavar="LIVE", help="what a service embedded: at least 20 images, better 1,000")
    parser.add_argument("golden", metavar="GOLDEN", help="what to compare it with")


def run(given: argparse.Namespace) -> int:
    drift = measure_drift(read_embeddings(given.live), read_embeddings(given.golden))
    print(
        f"{'drift' if drift.drifted else 'no drift'}: discrepancy {drift.mmd2:.2g}, threshold {drift.threshold:.2g}, "
        f"p {drift.p_value:.3f}; {drift.rows[0]} live rows, {drift.rows[1]} golden; cosine of the means "
        f"{drift.mean_cosine:.3f}"
    )
    return DRIFTED if drift.drifted else 0


def read_embeddings(where: str) -> np.ndarray:
    """Float32 [rows, dimension]. Raises DataError where there are none."""
    path = local(where)
    try:
        if path is None or path.suffix not in (".npy", ".npz"):
            return np.concatenate(_parts(where, path))
        return _array(path)
    except DeployError:
        raise
    except Exception as error:  # NumPy's and pyarrow's readers raise whatever their parsers meet
        reason = first_line(error)
        raise DataError(
            f"cannot read {shown(where)} ({reason}): give a .npy, a .npz with `images`, a folder of .npy, or Parquet "
            "with a column `embedding`"
        ) from error


def _parts(where: str, path: Path | None) -> list[np.ndarray]:
    if path and not path.exists():
        raise FileNotFoundError("no such file or folder")
    if path and path.is_file() and path.suffix != TABLE:
        raise ValueError("a file of another kind")
    found = [_array(array) for array in sorted(path.glob("*.npy"))] if path else []
    found = found or [rows for rows in map(_whole, read_tables(where)) if len(rows)]
    if not found:
        raise ValueError("it holds no embeddings")
    return found


def _whole(table: Any) -> np.ndarray:
    if "uint8" in str(table.schema.field("embedding").type):
        raise ValueError("it holds only signs (`embed --dtype binary`): embed with another --dtype")
    return read_vectors(table)


def _array(path: Path) -> np.ndarray:
    with path.open("rb") as file:  # NumPy leaves a file open that it opens itself and cannot read
        content = np.load(file)
        return np.asarray(content["images"] if path.suffix == ".npz" else content, dtype=np.float32)
