"""Embed 50,000 images, kill it half-way, go on: python -m benchmarks.embed [images] (or `make bench-embed`)

With artifacts/package as the last `dvc repro` made it. Renders that many distinct pictures into build/embed/ (once),
embeds them without a stop, then again with a kill, and holds the files of both runs against each other, byte by byte.
Then times tower, feeds and embed, in turn, on some of the pictures and on photographs of 480 x 640 pixels: what holds
embed up? Prints one line each and writes reports/embed.json.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from clip_deploy.core.environment import cores, hardware
from clip_deploy.core.files import write_text
from clip_deploy.core.package import read_package
from clip_deploy.data import scenes
from clip_deploy.inference.classifier import CPU_FEEDS, ZeroShotClassifier
from clip_deploy.timing.end_to_end import TEXTURE, texture

PHOTO = [480, 640]  # height and width
SAMPLE = {"pictures": 1024, "photos": 192}  # how many are timed in parts
BATCH = 32  # as embed's
ROUNDS = 5

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "embed"
PACKAGE = ROOT / "artifacts" / "package"
OUTPUT = ROOT / "reports" / "embed.json"
FOLDER = 1000  # images a folder
PART = 5000  # images a part


def main(count: int) -> None:
    images = WORK / f"images-{count}"
    record: dict[str, object] = {"images": count, "render_s": render_all(images, count)}
    whole, killed = WORK / "whole", WORK / "killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    print(embed(images, whole))
    record["whole_s"] = round(time.monotonic() - started, 1)
    record["images_per_s"] = round(count / (time.monotonic() - started))
    record["parts_when_killed"] = embed_and_kill(images, killed, parts(whole) // 2)
    print(f"killed (SIGKILL) with {record['parts_when_killed']} of {parts(whole)} parts written")
    started = time.monotonic()
    print(embed(images, killed))
    record["resumed_s"] = round(time.monotonic() - started, 1)
    record["same_bytes"] = contents(whole) == contents(killed)
    record["target"] = read_package(PACKAGE).encoder.towers.vision.target
    pictures = sorted(images.rglob("*.jpg"))[: SAMPLE["pictures"]]
    record["parts"] = {"pictures": parts_alone(pictures), "photos": parts_alone(photos(WORK / "photos"))}
    record["machine"] = asdict(hardware())
    write_text(OUTPUT, json.dumps(record, indent=2) + "\n")
    print(", ".join(f"{name} {value}" for name, value in record.items() if name not in ("machine", "parts")))


def render_all(images: Path, count: int) -> float:
    """Seconds that rendering what is missing took."""
    started = time.monotonic()
    with Pool() as pool:
        list(pool.imap_unordered(partial(render, images), range(count), chunksize=FOLDER))
    return round(time.monotonic() - started, 1)


def render(images: Path, index: int) -> None:
    path = images / f"{index // FOLDER:03}" / f"{index:06}.jpg"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    image, _ = scenes.render("embed", index, index % len(scenes.CLASSES))
    unfinished = path.with_suffix(".unfinished")
    image.save(unfinished, "jpeg", quality=90)
    unfinished.replace(path)


def photos(folder: Path) -> list[Path]:
    """Pictures drawn up to PHOTO with the texture of photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:03}.jpg" for index in range(SAMPLE["photos"])]
    for index, path in enumerate(paths):
        draw_photo(path, PHOTO, 90, index)
    return paths


def draw_photo(path: Path, size: list[int], quality: int, index: int) -> None:
    """Write a scene, drawn up to `size` (height and width) with the texture of photographs, as JPEG."""
    image, _ = scenes.render("embed", index, index % len(scenes.CLASSES))
    large = np.asarray(image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC))
    grain = TEXTURE * texture(size, np.random.default_rng(index))
    unfinished = path.with_suffix(".unfinished")
    Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(unfinished, "jpeg", quality=quality)
    unfinished.replace(path)


def parts_alone(paths: list[Path]) -> dict[str, object]:
    """Images per second of the tower, of each feed and of embed with it; medians of turns that alternate.

    `of_slower` is embed's rate over that of the slower of tower and feed, each with all cores to itself. Where both
    need the same cores, no more than 1 / (1 / tower + 1 / feed) can be had: `of_shared` is embed's rate over that.
    """
    opened = {feed: ZeroShotClassifier.open(PACKAGE, feed=feed, allow_spinning=False) for feed in CPU_FEEDS}
    exact = opened["exact"]
    encoded = [exact.prepare(path) for path in paths[:BATCH]]
    calls: dict[str, Callable[[], object]] = {
        "tower": lambda: [exact.encode_prepared(encoded) for _ in range(len(paths) // BATCH)]
    }
    with ThreadPoolExecutor(cores()) as pool:
        for feed, classifier in opened.items():
            calls[f"feed {feed}"] = partial(_all, pool, classifier, paths)
            calls[f"embed {feed}"] = partial(_embed_each, classifier, paths)
        rates = {name: len(paths) / seconds for name, seconds in in_turn(calls).items()}
    both = [classifier.embed_images(paths, BATCH) for classifier in opened.values()]
    found: dict[str, object] = {"images": len(paths), "tower_per_s": round(rates["tower"])}
    for feed in CPU_FEEDS:
        tower, alone, whole = rates["tower"], rates[f"feed {feed}"], rates[f"embed {feed}"]
        found[feed] = {
            "feed_per_s": round(alone),
            "embed_per_s": round(whole),
            "of_slower": round(whole / min(tower, alone), 2),
            "of_shared": round(whole * (1 / tower + 1 / alone), 2),
        }
    found["feed_speedup"] = round(rates["feed fast"] / rates["feed exact"], 2)
    found["cosine_min"] = round(float((both[0] * both[1]).sum(axis=1).min()), 5)
    print(f"{len(paths)} images: {found}")
    return found


def _all(pool: ThreadPoolExecutor, classifier: ZeroShotClassifier, paths: list[Path]) -> None:
    deque(pool.map(classifier.prepare, paths), maxlen=0)


def _embed_each(classifier: ZeroShotClassifier, paths: list[Path]) -> None:
    deque(classifier.embed_each(paths, BATCH), maxlen=0)


def in_turn(calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each call; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: median(seconds[1:]) for name, seconds in times.items()}


def command(images: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "clip_deploy", "embed", str(images), str(output), "--part-size", str(PART)]


def embed(images: Path, output: Path) -> str:
    done = subprocess.run(command(images, output), cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip().replace(f"{ROOT}/", "")


def embed_and_kill(images: Path, output: Path, least: int) -> int:
    """Kill it as soon as `least` parts are there; how many there were."""
    process = subprocess.Popen(command(images, output), cwd=ROOT, stderr=subprocess.DEVNULL)
    while parts(output) < least and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return parts(output)


def parts(output: Path) -> int:
    return len(list(output.glob("part-*.parquet")))


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("part-*.parquet")}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
