"""A sample of the embeddings that a service makes, for `clip-deploy drift`."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from uuid import uuid4

import numpy as np

from clip_deploy.core.errors import DataError

ROWS = 50  # a file: a process that ends loses fewer


class EmbeddingSample:
    """Keeps a share of all embeddings, in .npy files [ROWS, dimension] that appear whole or not at all.

    Threads and processes may share a folder. A disk that fails ends the sampling, with a warning, and not the service.
    """

    def __init__(self, folder: Path, share: float) -> None:
        """Raises DataError where `share` is not above 0 and at most 1."""
        if not 0 < share <= 1:
            raise DataError(
                f"sample_share is {share}: give more than 0 and at most 1, for example 0.01 for one in a hundred"
            )
        self.folder, self.share = folder, share
        self.held: list[np.ndarray] = []
        self.random, self.lock = np.random.default_rng(), Lock()

    def add(self, embeddings: Iterable[np.ndarray]) -> None:
        with self.lock:
            self.held += [row for row in embeddings if self.random.random() < self.share]
            while len(self.held) >= ROWS:
                kept, self.held = self.held[:ROWS], self.held[ROWS:]
                self._write(np.stack(kept))

    def _write(self, rows: np.ndarray) -> None:
        name = f"{uuid4().hex}.npy"
        partial = self.folder / f".{name}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.save(file, rows)
            partial.replace(self.folder / name)
        except OSError as error:
            self.share = 0.0
            warnings.warn(f"no more embeddings are sampled: {error}", stacklevel=2)
