"""Hold a sample of live embeddings against the golden set's: has what is sent to the server changed?

usage: python -m stages.drift LIVE GOLDEN      (no stage of the pipeline, no settings)

Each is one of: a .npy of embeddings [rows, dimension]; a .npz with them under `images`, as
artifacts/data/evaluation/reference.npz; a folder of .npy files, as ZeroShotClassifier.open(..., sample_folder=...)
keeps them; Parquet with a column `embedding`, one file or a folder or URI of it, as `python -m clip_deploy embed`
writes it. Exit code 0: no drift; 3: drift.
"""

import sys
from pathlib import Path

import numpy as np

from clip_deploy.core.errors import DataError, DeployError, first_line, quiet_if_unread
from clip_deploy.inference.storage import local, read_tables, shown, vectors
from clip_deploy.serving.drift import measure_drift

DRIFTED = 3


@quiet_if_unread()
def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(arguments) != 2:
        wanted = "usage: python -m stages.drift LIVE GOLDEN"
        print(f"{wanted}: two samples are needed, {len(arguments)} given", file=sys.stderr)
        return 2
    try:
        live, golden = (read_embeddings(name) for name in arguments)
        drift = measure_drift(live, golden)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
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
    found = [_array(array) for array in sorted(path.glob("*.npy"))] if path else []
    found = found or [rows for rows in map(vectors, read_tables(where)) if len(rows)]
    if not found:
        raise ValueError("it holds no embeddings")
    return found


def _array(path: Path) -> np.ndarray:
    content = np.load(path)
    return np.asarray(content["images"] if path.suffix == ".npz" else content, dtype=np.float32)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
