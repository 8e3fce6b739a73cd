"""Pictures as pixel values on a GPU, batch by batch: JPEG files are decoded there, all else is read on the CPU."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_deploy.core.errors import DataError
from clip_deploy.core.images import jpeg_of
from clip_deploy.core.jpeg import Jpeg, whole_jpeg
from clip_deploy.core.preprocessing import Preprocessing
from clip_deploy.inference.file_reader import FileReaders
from clip_deploy.runtimes import open_gpu_preprocessing

CHUNK = 64  # pictures that one job of the pool reads: fewer jobs take Python's lock less often from the decoders


class Batch(NamedTuple):
    """Pixel values on the GPU, float32 [rows, 3, height, width], and of rows that cannot be read the reason."""

    pixels: Any
    unreadable: dict[int, DataError]


class GpuFeed:
    """What cannot be decoded on the GPU is read on the CPU, and takes its place among its neighbours."""

    def __init__(self, settings: Preprocessing, read: Callable[[Any], np.ndarray | DataError]) -> None:
        """Args: read: one picture's pixel values on the CPU, or why it cannot be read.

        Raises UnavailableError as open_gpu_preprocessing does.
        """
        self.preprocessing, self.read, self.files = open_gpu_preprocessing(settings), read, FileReaders()
        self.decoding = ThreadPoolExecutor(self.preprocessing.workers, "decoder")  # they keep their buffers

    def begin(self, pool: ThreadPoolExecutor, pictures: Sequence[Any]) -> "Future[Batch]":
        """Have a batch read by the pool's threads, and decoded behind the batches before it."""
        chunks = [pictures[start : start + CHUNK] for start in range(0, len(pictures), CHUNK)]
        contents = [pool.submit(self._contents, chunk) for chunk in chunks]
        return self.decoding.submit(self._batch, pool, contents)

    def _contents(self, pictures: Sequence[Any]) -> list[tuple[Jpeg | None, Any]]:
        """Each file that is a whole JPEG, or None; and its picture, which is not fetched twice."""
        if all(isinstance(picture, Path | str) for picture in pictures):
            return list(zip(self.files(pictures), pictures, strict=True))
        return [(whole_jpeg(content), picture) for content, picture in map(jpeg_of, pictures)]

    def _batch(self, pool: ThreadPoolExecutor, contents: list["Future[list[tuple[Jpeg | None, Any]]]"]) -> Batch:
        return self.fill([each for chunk in contents for each in chunk.result()], self.read, pool.map)

    def fill(
        self,
        read: Sequence[tuple[Jpeg | None, Any]],
        on_cpu: Callable[[Any], np.ndarray | DataError],
        each: Callable[..., Iterable[np.ndarray | DataError]] = map,
    ) -> Batch:
        """Pixel values of files, or None, with their pictures, which `on_cpu` reads where the GPU does not.

        Args:
            each: as map, of a pool's threads.
        """
        pixels, left = self.preprocessing([jpeg for jpeg, _ in read])
        unreadable = {}
        for row, found in zip(left, each(on_cpu, [read[row][1] for row in left]), strict=True):
            if isinstance(found, DataError):
                unreadable[row] = found
            else:
                self.preprocessing.fill(pixels, row, found)
        return Batch(pixels, unreadable)
