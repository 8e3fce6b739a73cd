"""A target's folder: its files, and target.json saying what they are. Written whole or not at all."""

import filecmp
import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from clip_deploy.core.environment import located
from clip_deploy.core.errors import EVERY_ROW, ConfigError, DeployError, DiskError, UnavailableError
from clip_deploy.core.files import disk_error_code, new_folder, sha256, write_text
from clip_deploy.core.model import Model
from clip_deploy.core.parsing import plain, read_record
from clip_deploy.core.records import Facts, Search

TOWERS = ("vision", "text")  # in this order everywhere
RUNTIMES = ("eager", "compiled", "torchscript", "aoti", "fused", "ort", "ort_tensorrt", "openvino", "tensorrt")
EMBEDS = {"vision": "image_embeds", "text": "text_embeds"}  # the first output of each tower's graph
MANIFEST = "target.json"
MANIFEST_NAME = "{}.manifest.json"  # of a folder: what it holds
CACHE = ".dvc/cache/files/md5"

FileFacts = Mapping[str, str | int]  # of a file in a manifest: its sha256 and bytes


@dataclass
class Target:
    """What a folder of artifacts/ holds.

    Attributes:
        runtime: which module of clip_deploy.runtimes opens it.
        precision: the gate's class, "fp32", "fp16", "bf16", "fp8" or "int8".
        files: the files that a deployment ships, relative to the folder; their bytes are the target's size.
        build: how it was made (opset, fused nodes, quantisation settings...), for the report.
        unavailable: why it could not be built here, or None.
        failed: whether that is an error that nobody foresaw: its row says `fail`.
        search: which nodes INT8 or FP8 leaves in float and why (records.Search), where there was a budget.
        device: where it runs, "cpu" or "cuda".
        image_input: what its image tower takes: "pixel_values", or "images" (uint8 RGB) where it preprocesses itself.
        sha256: of each of `files` when it was built.
    """

    runtime: str
    precision: str
    files: list[str] = field(default_factory=list)
    model: Model = field(default_factory=Model)
    build: Facts = field(default_factory=dict)
    unavailable: str | None = None
    failed: bool = False
    search: Search | None = None
    device: str = "cpu"
    image_input: str = "pixel_values"
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str | None:
        """The target beside it that it was built from; None where that was PyTorch's model itself."""
        source = self.build.get("source")
        return source if isinstance(source, str) else None

    @property
    def opset(self) -> int | None:
        """That its graphs were asked to have."""
        opset = self.build.get("opset")
        return opset if isinstance(opset, int) else None

    def said(self, key: str) -> str:
        """A fact of `build` in words; empty where it has none of that name."""
        return str(self.build.get(key, ""))

    def files_of(self, towers: Sequence[str]) -> list[str]:
        """Those of `files` that these towers need: a name that begins with another tower's is not among them."""
        others = tuple(f"{tower}." for tower in TOWERS if tower not in towers)
        return [name for name in self.files if not name.startswith(others)]

    @property
    def kept_in_float(self) -> set[str]:
        """Nodes that are in FP32 by the settings, by the search, or because float16 does not hold their values."""
        kept, overflowing = (self.build.get(key, []) for key in ("keep_fp32", "left_in_fp32"))
        names = set(map(str, kept)) if isinstance(kept, list) else set()
        names |= {str(name).rsplit(" (", 1)[0] for name in overflowing} if isinstance(overflowing, list) else set()
        return names | set(self.search.left_in_float if self.search else [])


def read_target(folder: Path) -> Target:
    """Raises ConfigError where the folder holds no target, or one of another version."""
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder} is not a built target (it has no {MANIFEST}); run `dvc repro`")
    return read_record(Target, folder / MANIFEST, null_is_nan=False)


def write_target(folder: Path, target: Target) -> None:
    """Write target.json, which read_target reads, into the target's folder."""
    write_text(folder / MANIFEST, json.dumps(plain(target), indent=2) + "\n")


def read_source(folder: Path) -> Target:
    """A target to build another from: an ONNX graph in float32.

    Raises UnavailableError where it could not be built itself, ConfigError where it is of another kind.
    """
    target = read_target(folder)
    if target.unavailable:
        raise UnavailableError(f"{folder.name}: {target.unavailable}")
    if target.precision != "fp32" or "vision.onnx" not in target.files:
        raise ConfigError(
            f"source is {folder}, a target of {target.runtime} in {target.precision}: accepted are the export "
            "(artifacts/onnx-fp32) and what `optimize` made of it in fp32"
        )
    return target


def check_files(folder: Path) -> None:
    """Raise DeployError where a file of the target is not the one that was built: DVC trusts its cache unread."""
    for name, built in read_target(folder).sha256.items():
        path = folder / name
        if not path.is_file() or sha256(path) != built:
            raise _damaged(folder, path, MANIFEST)


def check_prepared(folder: Path) -> None:
    """The same of a folder of prepared data, by its manifest beside it."""
    path = folder.with_name(MANIFEST_NAME.format(folder.name))
    try:
        files = json.loads(path.read_text())["files"]
        found = differences(folder, files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DeployError(f"{path} does not say what {folder} holds ({error}); run `dvc repro -f prepare`") from error
    if found:
        raise _damaged(folder, folder / found[0].rpartition(": ")[0], path.name)


def write_manifest(folder: Path) -> None:
    """Say beside a folder which files it holds."""
    text = json.dumps({"files": hashes(folder)}, indent=1)
    write_text(folder.with_name(MANIFEST_NAME.format(folder.name)), text + "\n")


def _damaged(folder: Path, path: Path, known: str) -> DiskError:
    damaged = " ".join([str(folder), *map(str, _cached(path))])
    return DiskError(
        f"{path} is not the file that was built (its hash is in {known}): the disk or DVC's cache damaged it; `rm -r "
        f"{damaged}` and `dvc repro` build it again"
    )


def _cached(path: Path) -> list[Path]:
    """The objects of DVC's cache with the file's content: it came from there, and would come again."""
    if not path.is_file():
        return []
    size = path.stat().st_size
    same_size = (item for item in sorted(located(CACHE).glob("??/*")) if item.stat().st_size == size)
    return [item for item in same_size if filecmp.cmp(item, path, shallow=False)]


def size_bytes(folder: Path) -> int:
    """Bytes that the target's files take on disk, external data included."""
    return sum((folder / name).stat().st_size for name in read_target(folder).files)


@contextmanager
def real_graph(path: Path) -> Iterator[Path]:
    """A graph where ONNX Runtime reads its weights: it refuses symbolic links that lead out of the graph's folder.

    DVC makes such links into its cache with cache.type symlink; hard links of what they lead to stand in for them.
    Raises DiskError where the cache lies on another disk.
    """
    weights = path.with_name(f"{path.name}.data")
    if not weights.is_symlink():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=path.parent.parent) as folder:
        try:
            for link in (path, weights):
                os.link(link.resolve(), Path(folder, link.name))
        except OSError as error:
            raise DiskError(
                f"{weights} is a link to a file outside its folder, and ONNX Runtime does not follow it "
                f"({error.strerror}): `dvc unprotect {path.parent}` makes it a file; `dvc config cache.type copy` does "
                "so for all later ones"
            ) from error
        yield Path(folder, path.name)


def hashes(folder: Path, known: Mapping[str, str] = {}) -> dict[str, FileFacts]:
    """SHA-256 and bytes of every file below `folder`, by its path in there: what a manifest's `files` holds.

    `known` are hashes that need not be taken again: weights are large.
    """
    return {
        name: {"sha256": known.get(name) or sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in _names(folder)
    }


def differences(folder: Path, files: dict[str, FileFacts], besides: str | None = None) -> list[str]:
    """Every way in which `folder` is not what `hashes` gave: files missing, changed or added, the last but `besides`.

    Names that a manifest gives are never followed out of the folder.
    """
    present = _names(folder)
    missing = [f"{name}: missing" for name in files if name not in present]
    changed = [f"{name}: changed" for name in files if name in present and not _is(folder / name, files[name])]
    added = [f"{name}: added" for name in present if name not in files and name != besides]
    return missing + changed + added


def _names(folder: Path) -> list[str]:
    """Links count as files, wherever they lead."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _is(path: Path, facts: FileFacts) -> bool:
    return path.is_file() and path.stat().st_size == facts["bytes"] and sha256(path) == facts["sha256"]


def build(output: Path, make: Callable[[Path], Target], fallback: Target | None) -> None:
    """Let `make` fill a new folder and describe it, then move the folder to `output`.

    Where `make` raises, the folder holds only `fallback` with the reason: unavailable where that is an
    UnavailableError, else failed. Raised again is what concerns every target (see `failure`), and everything where
    there is no fallback.
    """
    with new_folder(output) as folder:
        try:
            target = make(folder)
        except Exception as error:
            if fallback is None:
                raise
            target = fallback
            target.failed = not isinstance(error, UnavailableError) or disk_error_code(error) is not None
            target.unavailable = failure(error) if target.failed else str(error)
            shutil.rmtree(folder)  # what was written before
            folder.mkdir()
        target.sha256 = {name: sha256(folder / name) for name in target.files}
        write_target(folder, target)


def failure(error: Exception) -> str:
    """Why one row failed, where nobody foresaw it, and how it is tried again; the traceback goes to standard error.

    Raises `error` again where it is of the settings, the checkpoint, the data or the disk: it concerns every row.
    """
    if isinstance(error, EVERY_ROW) or disk_error_code(error) is not None:
        raise error
    traceback.print_exception(error)
    line = next(iter(str(error).strip().splitlines()), "") or "memory ran out" * isinstance(error, MemoryError)
    named = [line] if isinstance(error, DeployError) else [type(error).__name__, *filter(None, [line])]
    stage = os.environ.get("DVC_STAGE")  # DVC knows no failed row, and would not run the stage again
    again = f"`dvc repro -fs {stage} && dvc repro` tries it again" if stage else "run the stage again to try it again"
    return f"{': '.join(named)} (its traceback is in the terminal); {again}"


@contextmanager
def described_folder(output: Path) -> Iterator[Path]:
    """As new_folder; a manifest beside it then says which files it holds."""
    with new_folder(output) as folder:
        yield folder
    write_manifest(output)
