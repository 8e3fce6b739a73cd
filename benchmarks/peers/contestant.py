"""A contestant's folder: both towers' files and contestant.json. Every peer's Python imports it: standard library only.

A folder holds either {"runtime", "precision", "files", "build"} or {"unavailable": reason}: no contestant is dropped.
Its "key" says from what it was made.
"""

import json
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

from clip_deploy.timing.latency_worker import reason

MANIFEST = "contestant.json"

# Peer -> what it builds, in the order of the table.
PEERS = {
    "torch": ("torch-eager", "torch-compile"),
    "optimum": (
        "optimum-export",
        "optimum-o1",
        "optimum-o2",
        "optimum-o3",
        "optimum-int8-avx2",
        "optimum-int8-avx512-vnni",
        "optimum-o2-int8-avx2",
        "optimum-o2-int8-avx512-vnni",
    ),
    "olive": ("olive-fp32", "olive-int8"),
    "openvino": ("ov-fp32", "ov-auto", "nncf-int8"),
}

Recipe = Callable[[Path], dict]


def build_all(output: Path, key: str, recipes: dict[str, Recipe]) -> None:
    """Let each recipe fill output/<name> and say how: {"runtime", "precision", "files", "build"}.

    What was made from the same, known by `key`, stays. A peer that fails the first time fails the next time as well.
    """
    for name, recipe in recipes.items():
        if not is_made(output / name, key):
            build(output / name, key, recipe)


def is_made(folder: Path, key: str) -> bool:
    """Whether the contestant is complete and made from what `key` stands for: the manifest is written last."""
    return (folder / MANIFEST).exists() and read(folder).get("key") == key


def build(folder: Path, key: str, recipe: Recipe) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        record = recipe(folder)
    except Exception as error:  # whatever a peer raises is the reason that its row shows
        traceback.print_exc()
        record = {"unavailable": reason(error)}
    write(folder, {**record, "key": key})


def write(folder: Path, record: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n")


def read(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def model_type(checkpoint: Path) -> str:
    return json.loads((checkpoint / "config.json").read_text()).get("model_type", "")


def need_clip(checkpoint: Path, peer: str) -> None:
    """Stop where the peer has no class for the checkpoint's towers with their projection."""
    kind = model_type(checkpoint)
    if kind != "clip":
        raise SystemExit(f"{peer} has no towers with their projection for {kind!r}, only for 'clip'")
