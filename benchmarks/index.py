"""Search an index and the parts that it was made of: python -m benchmarks.index [vectors]

Writes made-up embeddings in every type into build/index/, as `embed` does: unit vectors of 512 dimensions in clusters,
the images' around one direction and the texts' around another, as those of CLIP models lie. Times the index's making,
a search in it and one through all parts, from opening their files on, and says which of the 10 images that are nearest
in the parts the index finds. Prints a line for each type and writes reports/index.json.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import pyarrow

from clip_deploy.core.environment import hardware
from clip_deploy.core.files import write_text
from clip_deploy.core.vectors import DTYPES, encode, unit
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import MADE_BY, PART, read_part
from clip_deploy.inference.index import build_index
from clip_deploy.inference.search import search
from clip_deploy.inference.storage import list_parts, write_part

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "index"
OUTPUT = ROOT / "reports" / "index.json"
DIMENSION = 512
CLUSTERS = 1000
ROWS = 10_000  # a part
QUERIES = 200
THROUGH_PARTS = 3  # queries that are timed without an index
TOP = 10


T = TypeVar("T")


class Texts:
    """In the place of a package: its texts are the numbers of made-up embeddings."""

    fingerprint = "made up"

    def __init__(self, embeddings: np.ndarray) -> None:
        self.embeddings = embeddings

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        found: np.ndarray = self.embeddings[[int(text) for text in texts]]
        return found


def main(count: int) -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    random = np.random.default_rng(0)
    centres = random.standard_normal((CLUSTERS, DIMENSION)).astype(np.float32)
    directions = 2 * random.standard_normal((2, DIMENSION)).astype(np.float32)
    texts = Texts(made_up(random, QUERIES, centres, directions[0]))
    for start in range(0, count, ROWS):
        images = made_up(random, min(ROWS, count - start), centres, directions[1])
        for dtype in DTYPES:
            write(WORK / dtype, start // ROWS, start, encode(images, dtype), dtype)
    found = {dtype: measure(WORK / dtype, WORK / f"{dtype}-index", texts) for dtype in DTYPES}
    record = {"vectors": count, "dimensions": DIMENSION, "top": TOP, "types": found, "machine": asdict(hardware())}
    write_text(OUTPUT, json.dumps(record, indent=2) + "\n")


def made_up(random: np.random.Generator, rows: int, centres: np.ndarray, direction: np.ndarray) -> np.ndarray:
    noise = random.standard_normal((rows, DIMENSION), dtype=np.float32)
    return unit(direction + centres[random.integers(0, len(centres), rows)] + noise)


def write(folder: Path, number: int, first: int, rows: np.ndarray, dtype: str) -> None:
    """A part, as `embed` writes it."""
    header = {"package": Texts.fingerprint, "dtype": dtype, "dimensions": DIMENSION, "unreadable": []}
    columns = {
        "path": pyarrow.array([f"{row:08}.jpg" for row in range(first, first + len(rows))]),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), rows.shape[1]),
    }
    write_part(str(folder), PART.format(number), pyarrow.table(columns, metadata={MADE_BY: json.dumps(header)}))


def measure(parts: Path, index: Path, texts: Texts) -> dict[str, float]:
    classifier = cast(ZeroShotClassifier, texts)
    build_s, _ = seconds(lambda: build_index(str(parts), str(index)))
    index_s, found = seconds(lambda: [search(classifier, index, str(text), TOP).hits for text in range(QUERIES)])
    parts_s, _ = seconds(lambda: [search(classifier, parts, str(text), TOP).hits for text in range(THROUGH_PARTS)])
    expected = nearest(parts, texts.embeddings)
    right = [len({hit.path for hit in hits} & names) for hits, names in zip(found, expected, strict=True)]
    record = {
        "build_s": round(build_s, 1),
        "index_mb": round(size_mb(index), 1),
        "parts_mb": round(size_mb(parts), 1),
        "index_queries_per_s": round(QUERIES / index_s, 1),
        "parts_queries_per_s": round(THROUGH_PARTS / parts_s, 2),
        "recall_at_10_percent": round(100 * sum(right) / (TOP * QUERIES), 1),
    }
    print(f"{parts.name}: " + ", ".join(f"{name} {value:,}" for name, value in record.items()), flush=True)
    return record


def seconds(work: Callable[[], T]) -> tuple[float, T]:
    started = time.monotonic()
    done = work()
    return time.monotonic() - started, done


def nearest(parts: Path, texts: np.ndarray) -> list[set[str]]:
    """By all vectors of the parts, the TOP nearest of each text."""
    read = [read_part(str(parts), name, DIMENSION) for name in list_parts(str(parts))]
    names = [path for paths, _ in read for path in paths]
    cosines = np.concatenate([texts @ vectors.T for _, vectors in read], axis=1)
    return [{names[row] for row in rows} for rows in np.argpartition(-cosines, TOP, axis=1)[:, :TOP].tolist()]


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
