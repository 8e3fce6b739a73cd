"""Embeddings of texts that were seen before, by text and text tower: the least recently used go first."""

import hashlib
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from clip_deploy.core.files import disk_errors

NUMBER = np.dtype("<f4")
HASH_BYTES = 32


class TextCache:
    """At most `size` embeddings in memory; with a `folder`, all of them on disk as well, where nothing is dropped."""

    def __init__(self, tower: str, dimension: int, size: int, folder: Path | None = None) -> None:
        """`tower` is a hash of all that makes an embedding of a text: another tower finds nothing of this one's.

        An embedding is float32 [dimension].
        """
        self.tower, self.dimension, self.size, self.folder = tower, dimension, size, folder
        self.held: OrderedDict[str, np.ndarray] = OrderedDict()

    def get(self, text: str) -> np.ndarray | None:
        key = self._key(text)
        if key in self.held:
            self.held.move_to_end(key)
            return self.held[key]
        found = self._read(key)
        if found is not None:
            self._hold(key, found)
        return found

    def put(self, text: str, embedding: np.ndarray) -> None:
        key = self._key(text)
        self._hold(key, embedding.copy())  # a row would keep its whole batch
        if self.folder is None:
            return
        path = self._path(key)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several processes may share the folder
            partial.write_bytes(_sealed(embedding.astype(NUMBER).tobytes()))
            partial.replace(path)

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self.tower}\0{text}".encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return Path(self.folder or ".") / key[:2] / f"{key}.float32"

    def _read(self, key: str) -> np.ndarray | None:
        """None where it is not there, or not what was written: it is computed and written anew."""
        if self.folder is None:
            return None
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        numbers = content[:-HASH_BYTES]
        if len(numbers) != self.dimension * NUMBER.itemsize or content != _sealed(numbers):
            return None
        embedding = np.frombuffer(numbers, NUMBER).astype(np.float32)
        return embedding if np.isfinite(embedding).all() else None

    def _hold(self, key: str, embedding: np.ndarray) -> None:
        self.held[key] = embedding
        self.held.move_to_end(key)
        if len(self.held) > self.size:
            self.held.popitem(last=False)


def _sealed(numbers: bytes) -> bytes:
    """An embedding's bytes with their hash: no header that could be torn, and every damage shows."""
    return numbers + hashlib.sha256(numbers).digest()
