"""From photographs to embeddings on GPUs: python -m benchmarks.embed_gpu [images] [size...] (or `make bench-embed-gpu`)

With artifacts/package as the last `dvc repro` made it for a GPU. Lays that many JPEG files of each size (640x480 and
500x400, or those given), of which some hundred differ, into build/embed/. Times in turn on one GPU: the tower alone,
each feed alone, and embed with it, from files and, for the feed gpu, from their bytes in memory. Then what `clip-deploy
embed --gpus` does, from files on disk, on one GPU and on all of them, and holds their parts against each other, byte by
byte. Prints and writes reports/embed_gpu.json after each.
"""

import json
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.embed import PACKAGE, contents, draw_photo, in_turn
from clip_deploy.core.environment import cores, gpus, hardware
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.files import write_text
from clip_deploy.core.images import Encoded
from clip_deploy.core.package import read_package
from clip_deploy.inference.classifier import FEEDS, Picture, ZeroShotClassifier, ahead, batched
from clip_deploy.inference.embed import EmbedJob, EmbedSettings, Header, embed
from clip_deploy.inference.embed_gpus import Opening, choose_gpus, make_on_gpus
from clip_deploy.inference.storage import Part, open_source

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "embed"
OUTPUT = ROOT / "reports" / "embed_gpu.json"
SIZES = {"640x480": ([480, 640], 90), "500x400": ([400, 500], 96)}  # height and width, and JPEG's quality
DISTINCT = 256  # photographs of each size
TIMED = {"exact": 1024, "fast": 4096, "gpu": 49152, "tower": 65536}  # images of one turn, seconds of it
FOLDER = 1000  # images a folder
PART = 10_000
ROUNDS = 3  # of tower, feeds and embed
TURNS = 2  # of embed on one GPU and on all


def main(count: int, sizes: list[str]) -> None:
    encoder = read_package(PACKAGE).encoder
    found: dict[str, dict[str, object]] = {}
    record = {
        "target": encoder.towers.vision.target,
        "batch": encoder.towers.vision.best_batch,
        "sizes": found,
        "machine": asdict(hardware()),
    }
    for name in sizes or SIZES:
        folder = lay_out(name, count)
        paths = sorted(folder.rglob("*.jpg"))
        kilobytes = sum(path.stat().st_size for path in paths[:DISTINCT]) / DISTINCT / 1000
        found[name] = {"images": count, "kilobytes": round(kilobytes)}
        for measure in (partial(parts_alone, paths), partial(on_disk, folder, name)):
            found[name] |= measure()
            print(f"{name}: {found[name]}", flush=True)
            write_text(OUTPUT, json.dumps(record, indent=2) + "\n")


def lay_out(name: str, count: int) -> Path:
    """DISTINCT photographs under many names: links, so that a run of any length takes no more disk."""
    folder, drawn = WORK / f"photos-{name}-{count}", WORK / f"drawn-{name}"
    drawn.mkdir(parents=True, exist_ok=True)
    with Pool() as pool:
        list(pool.imap_unordered(partial(draw, drawn, name), range(DISTINCT)))
    for index in range(count):
        path = folder / f"{index // FOLDER:03}" / f"{index:06}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(drawn / f"{index % DISTINCT}.jpg")
    return folder


def draw(folder: Path, name: str, index: int) -> None:
    path, (size, quality) = folder / f"{index}.jpg", SIZES[name]
    if not path.exists():
        draw_photo(path, size, quality, index)


def parts_alone(paths: list[Path]) -> dict[str, object]:
    """Images per second of the tower, of each feed, and of embed with it; medians of turns that alternate."""
    opened = {}
    for feed in FEEDS:
        try:
            opened[feed] = ZeroShotClassifier.open(PACKAGE, "cuda", feed=feed)
        except UnavailableError as error:
            print(f"not timed: {error}", flush=True)
    best = opened["gpu"].batch_size
    counts = {name: min(len(paths), count) for name, count in TIMED.items()}
    counts["tower"] -= counts["tower"] % best
    calls: dict[str, Callable[[], object]] = {"tower": tower(opened["gpu"], paths[:best], counts["tower"])}
    for feed, classifier in opened.items():
        chosen = paths[: counts[feed]]
        calls[f"feed {feed}"] = partial(read_all, classifier, chosen)
        calls[f"embed {feed}"] = partial(embed_all, classifier, chosen)
    distinct = [Encoded(partial(bytes, path.read_bytes()), path.name) for path in paths[:DISTINCT]]
    held = [distinct[index % DISTINCT] for index in range(counts["gpu"])]
    calls["embed in memory, gpu"] = partial(embed_all, opened["gpu"], held)
    rates = {name: counts[name.split()[-1]] / seconds for name, seconds in in_turn(calls, ROUNDS).items()}
    sample = paths[:512]
    exact, found = (opened[feed].embed_images(sample) for feed in ("exact", "gpu"))
    record: dict[str, object] = {"per_s": {name: round(rate) for name, rate in rates.items()}}
    record["of_tower"] = round(rates["embed gpu"] / rates["tower"], 3)
    record["cosine_min"] = round(float((exact * found).sum(axis=1).min()), 6)
    return record


def tower(classifier: ZeroShotClassifier, paths: list[Path], count: int) -> Callable[[], object]:
    """Encodes the pixel values of one batch, which are on the GPU already, until so many images are encoded."""
    assert classifier.gpu
    with ThreadPoolExecutor(cores()) as pool:
        pixels, _ = classifier.gpu.begin(pool, paths).result()
    return lambda: [classifier.encoder.encode_images(pixels) for _ in range(count // len(paths))]


def read_all(classifier: ZeroShotClassifier, paths: list[Path]) -> None:
    """Pixel values of all, of which nothing is made."""
    with ThreadPoolExecutor(cores()) as pool:
        if feed := classifier.gpu:
            begun: Iterable[Any] = (feed.begin(pool, batch) for batch in batched(paths, classifier.batch_size))
            deque((future.result() for future in ahead(begun, 4)), maxlen=0)
        else:
            deque(pool.map(classifier.prepare, paths), maxlen=0)


def embed_all(classifier: ZeroShotClassifier, pictures: Sequence[Picture]) -> None:
    deque(classifier.embed_each(pictures), maxlen=0)


def on_disk(folder: Path, name: str) -> dict[str, object]:
    """Images per second from files to Parquet, on one GPU and on all, opening apart; and whether their bytes agree.

    Once with each process's first calls, and once from the time on when each has made a part.
    """
    chosen = {1: ["0"], len(gpus()): choose_gpus("all")}
    rates: dict[int, list[tuple[int, int]]] = {count: [] for count in chosen}
    same = True
    for _ in range(TURNS):
        outputs = []
        for count, numbers in chosen.items():
            output = WORK / f"gpus-{count}-{name}"
            shutil.rmtree(output, ignore_errors=True)
            rates[count].append(embed_on(numbers, folder, output))
            outputs.append(contents(output))
        same &= outputs[0] == outputs[-1]
    found: dict[str, object] = {"runs": rates, "same_bytes": same}
    for place, kind in enumerate(("embed_on_disk", "embed_on_disk_steady")):
        medians = {count: median(run[place] for run in runs) for count, runs in rates.items()}
        found[f"{kind}_per_s"] = medians
        found[f"{kind}_speedup"] = round(medians[len(gpus())] / medians[1], 3)
    return found


def embed_on(chosen: list[str], images: Path, output: Path) -> tuple[int, int]:
    """Images per second of what `embed --gpus` does, with the processes' first parts and without them."""
    opening = Opening.read(PACKAGE, "cuda", None, "gpu")
    began: list[float] = []
    arrived: list[tuple[float, int]] = []  # parts: when, and their rows

    def make(job: EmbedJob, missing: dict[int, Part], advance: Callable[[int], object]) -> Iterator[Header]:
        for header in make_on_gpus(opening, chosen, job, missing, advance, lambda: began.append(perf_counter())):
            arrived.append((perf_counter(), header["rows"]))
            yield header

    done = embed(opening, open_source(str(images), PART), str(output), EmbedSettings(part_size=PART), make)
    ended = perf_counter()
    first = arrived[len(chosen) - 1][0]
    steady = sum(rows for _, rows in arrived[len(chosen) :]) / (arrived[-1][0] - first)
    return round(done.embedded_now / (ended - began[0])), round(steady)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, sys.argv[2:])
