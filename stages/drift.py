"""Hold a sample of live embeddings against the golden set's: has what is sent to the server changed?

usage: python -m stages.drift LIVE GOLDEN      (no stage of the pipeline, no settings)

Each is a .npy of embeddings [rows, dimension], or a .npz with them under `images`, as
artifacts/data/evaluation/reference.npz. Exit code 0: no drift; 3: drift.
"""

import sys
from pathlib import Path

import numpy as np

from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.serving.drift import compare

DRIFTED = 3


def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(arguments) != 2:
        wanted = "usage: python -m stages.drift LIVE GOLDEN"
        print(f"{wanted}: two files are needed, {len(arguments)} given", file=sys.stderr)
        return 2
    try:
        live, golden = (read_embeddings(Path(name)) for name in arguments)
        drift = compare(live, golden)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{'drift' if drift.drifted else 'no drift'}: discrepancy {drift.mmd2:.2g}, threshold {drift.threshold:.2g}, "
        f"p {drift.p_value:.3f}; {drift.rows[0]} live rows, {drift.rows[1]} golden; cosine of the means "
        f"{drift.mean_cosine:.3f}"
    )
    return DRIFTED if drift.drifted else 0


def read_embeddings(path: Path) -> np.ndarray:
    """Raises DataError where the file holds none."""
    try:
        content = np.load(path)
        return content["images"] if path.suffix == ".npz" else content
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read {path} ({error}): give a .npy, or a .npz with `images`") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
