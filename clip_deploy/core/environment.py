"""What this machine and its libraries are. Nothing here changes between two runs on the same machine."""

import csv
import hashlib
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = {  # by the name that is imported (pillow aside): the distributions that bring it
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "transformers": ("transformers",),
    "tokenizers": ("tokenizers",),
    "safetensors": ("safetensors",),
    "onnx": ("onnx",),
    "onnx_ir": ("onnx-ir",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "numpy": ("numpy",),
    "ml_dtypes": ("ml_dtypes",),
    "pandas": ("pandas",),
    "pillow": ("pillow",),
    "datasets": ("datasets",),
    "openvino": ("openvino",),
    "nncf": ("nncf",),
    "tensorrt": ("tensorrt", "tensorrt-rtx-cu13-bindings"),
    "triton": ("triton",),
    "pynvml": ("nvidia-ml-py",),
    "markdown_it": ("markdown-it-py",),
}
INSTRUCTION_SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm")


def software() -> dict[str, str | None]:
    """Versions of Python and of the libraries that decide what is built; None where one is missing."""
    return {"python": platform.python_version(), **{name: _installed(*names) for name, names in LIBRARIES.items()}}


def _installed(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def hardware() -> dict:
    """Processor, its instruction sets, memory and GPUs."""
    cpu, flags = _processor()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": cores(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpus": gpus(),
    }


def located(name: str) -> Path:
    """A path as a setting gives it, or, where nothing is there, below the repository that owns the experiment.

    DVC runs a queued experiment in a folder of its own, with what git tracks and nothing besides, and names the
    repository that it belongs to in DVC_ROOT.
    """
    here = Path(name).expanduser()
    there = Path(os.environ.get("DVC_ROOT", ""), here)
    return there if there.exists() and not here.exists() else here


def cores() -> int:
    """Those that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_vnni(instruction_sets: list[str]) -> bool:
    """Whether the CPU multiplies u8 by s8 without 16-bit saturation."""
    return any(name.endswith(("vnni", "amx_int8", "asimddp", "i8mm")) for name in instruction_sets)


def _processor() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return (name[1].strip() if name else platform.machine()), set(flags[1].split()) if flags else set()


def gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU that CUDA_VISIBLE_DEVICES leaves to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not shutil.which("nvidia-smi") or visible == "":
        return []
    chosen = ["-i", visible] if visible is not None else []
    query = ["nvidia-smi", *chosen, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def fingerprint(path: Path) -> str:
    """SHA-256 over the names and contents of a file, or of all files of a folder."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def fingerprint_table(path: Path, column: str) -> str:
    """SHA-256 over a CSV file and the images in one of its columns. What is wrong with it, its reader says."""
    digest = hashlib.sha256(fingerprint(path).encode())
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            names = sorted({row.get(column) or "" for row in csv.DictReader(file)})
    except csv.Error:
        names = []
    for image in (path.parent / name for name in names):
        digest.update(fingerprint(image).encode() if os.path.isfile(image) else b"missing")  # False for any nonsense
    return digest.hexdigest()
