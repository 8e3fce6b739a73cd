"""Embed 50,000 images, kill it half-way, go on: python -m benchmarks.embed [images] (or `make bench-embed`)

With artifacts/package as the last `dvc repro` made it. Renders that many distinct pictures into build/embed/ (once),
embeds them without a stop, then again with a kill, and holds the files of both runs against each other, byte by byte.
Prints one line each and writes reports/embed.json.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from clip_deploy.core.environment import hardware
from clip_deploy.core.files import write_text
from clip_deploy.core.package import read_package
from clip_deploy.data import scenes

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "embed"
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
    record["target"] = read_package(ROOT / "artifacts/package").encoder.towers.vision.target
    record["machine"] = asdict(hardware())
    write_text(OUTPUT, json.dumps(record, indent=2) + "\n")
    print(", ".join(f"{name} {value}" for name, value in record.items() if name != "machine"))


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
