"""What this machine, its libraries and local inputs are. Nothing here changes between two runs on the same machine."""

import csv
import hashlib
import hmac
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from clip_deploy.core.files import Hash, remembered, sha256
from clip_deploy.core.image_files import class_files, walk

if TYPE_CHECKING:
    from clip_deploy.core.config import DataConfig, ModelConfig

LIBRARIES = {  # by the name that is imported (pillow aside): the distributions that bring it
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "transformers": ("transformers",),
    "tokenizers": ("tokenizers",),
    "sentencepiece": ("sentencepiece",),
    "open_clip": ("open_clip_torch",),
    "timm": ("timm",),
    "ftfy": ("ftfy",),
    "safetensors": ("safetensors",),
    "peft": ("peft",),
    "onnx": ("onnx",),
    "onnx_ir": ("onnx-ir",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "numpy": ("numpy",),
    "ml_dtypes": ("ml_dtypes",),
    "pandas": ("pandas",),
    "pillow": ("pillow",),
    "pillow_heif": ("pillow-heif",),
    "simplejpeg": ("simplejpeg",),
    "nvimgcodec": ("nvidia-nvimgcodec-cu13",),
    "cykooz_resizer": ("cykooz-resizer",),
    "datasets": ("datasets",),
    "starlette": ("starlette",),
    "uvicorn": ("uvicorn",),
    "uvloop": ("uvloop",),
    "httptools": ("httptools",),
    "orjson": ("orjson",),
    "prometheus_client": ("prometheus_client",),
    "openvino": ("openvino",),
    "nncf": ("nncf",),
    "tensorrt": ("tensorrt", "tensorrt-rtx-cu13-bindings"),
    "triton": ("triton",),
    "pynvml": ("nvidia-ml-py",),
    "markdown_it": ("markdown-it-py",),
    "vl_convert": ("vl-convert-python",),
}
MEMORY = ".dvc/tmp/hashes-{}"  # of a local input's files, by its path; git ignores it
INSTRUCTION_SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm")

MACHINE_ID = Path("/etc/machine-id")
MAX_THREADS = 1024  # of a process, or processes of a server: some libraries start all that they are asked for


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


@dataclass(frozen=True)
class Hardware:
    """Processor, its instruction sets, memory and GPUs, and which machine of that type it is (see machine)."""

    system: str
    cpu: str
    cores: int
    instruction_sets: list[str]
    memory_gb: int
    gpus: list[str]
    machine: str | None


@dataclass(frozen=True)
class Environment:
    """reports/environment.json: versions of Python and of libraries, None where one is missing, and the machine."""

    software: dict[str, str | None]
    hardware: Hardware


def environment_record() -> dict[str, object]:
    """What reports/environment.json would hold now."""
    return asdict(Environment(software(), hardware()))


def hardware() -> Hardware:
    """The machine as it is now; memory in GB, rounded."""
    return Hardware(
        system=f"{platform.system()} {platform.machine()}",
        cpu=_processor()[0],
        cores=cores(),
        instruction_sets=instruction_sets(),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        gpus=gpus(),
        machine=machine(),
    )


def machine() -> str | None:
    """Which of all machines of its type this is, as a hash from which no one reads the id itself; None where unknown.

    machine-id(5): it outlives a restart, each user may read it, and it is to be published only as a keyed hash. A
    container has its image's, and most images have none (None): two machines that run one image are then told apart
    no more than without it. What changes at each start, as a boot's id or a container's host name, would have all
    timings made anew, so nothing of the kind takes its place; nor does a board's serial number, which only root reads.
    """
    try:
        found = MACHINE_ID.read_text().strip()
    except OSError:
        return None
    if not re.fullmatch("[0-9a-f]{32}", found):  # empty or "uninitialized" before the first start
        return None
    return hmac.new(bytes.fromhex(found), b"clip-deploy", "sha256").hexdigest()[:12]


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


def instruction_sets() -> list[str]:
    """Those of INSTRUCTION_SETS that the CPU has; none where the system does not say, as on macOS."""
    flags = _processor()[1]
    return [name for name in INSTRUCTION_SETS if name in flags]


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


def fingerprint(path: Path, names: Iterable[str] | None = None, hash_file: Hash = sha256) -> str:
    """SHA-256 over the names and contents of a file, or of files of a folder: a function of what is read, and no more.

    Args:
        names: the files that count, by their paths in the folder; None for all that are not hidden, behind links too.
        hash_file: `files.remembered` leaves out the reading of what did not change.
    """
    if not path.is_dir():
        names = ["."]
    elif names is None:
        names = walk(path).files
    digest = hashlib.sha256()
    for name in sorted(names, key=lambda name: name.split("/")):
        digest.update(os.fsencode(name) + b"\0")
        try:
            digest.update(bytes.fromhex(hash_file(path / name)))
        except OSError:  # what is wrong with it, its reader says
            digest.update(b"unreadable")
    return digest.hexdigest()


def fingerprint_input(path: Path, settings: "ModelConfig | DataConfig", names: Iterable[str] | None = None) -> str:
    """SHA-256 over what is read of a local checkpoint or data set. Files that did not change are not read again.

    `names` are those that count of a checkpoint's folder.
    """
    source = getattr(settings, "source", "checkpoint")  # where it is not what its reader takes, that one says so
    here = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    with remembered(Path(MEMORY.format(here))) as hash_file:
        if source == "captions" and path.is_file():
            return fingerprint_table(path, settings.image_column, hash_file)  # type: ignore[union-attr]
        if source == "image-folder" and path.is_dir():
            names = class_files(path).files
        return fingerprint(path, names, hash_file)


def fingerprint_table(path: Path, column: str, hash_file: Hash = sha256) -> str:
    """SHA-256 over a CSV file and the images in one of its columns. What is wrong with it, its reader says."""
    digest = hashlib.sha256(fingerprint(path, hash_file=hash_file).encode())
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            names = sorted({row.get(column) or "" for row in csv.DictReader(file)})
    except csv.Error:
        names = []
    for image in (path.parent / name for name in names):
        known = os.path.isfile(image)  # False for any nonsense
        digest.update(fingerprint(image, hash_file=hash_file).encode() if known else b"missing")
    return digest.hexdigest()
