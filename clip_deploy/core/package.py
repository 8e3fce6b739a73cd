"""A package's manifest: read once, after its files were held against it, for all who open or serve the package."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.errors import DeployError, DiskError, UnavailableError
from clip_deploy.core.files import no_folder, sha256
from clip_deploy.core.manifest import INSIDE, File, Provenance, Run
from clip_deploy.core.parsing import FLAT, parse, read_record
from clip_deploy.core.preprocessing import Preprocessing
from clip_deploy.core.records import Metrics

FORMAT = 2  # of manifest.json
LABELS, PREPROCESSOR, TOKENIZER = "labels.json", "preprocessor.json", "tokenizer.json"
BEFORE = {"vision": PREPROCESSOR, "text": TOKENIZER}  # what makes a tower's inputs
DEFAULT_BATCH = 32
AGAIN = "package it again with `dvc repro package`"


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The target that is one tower of a package, in a folder of its name.

    Attributes:
        runtime: what opens it, one of artifact.RUNTIMES.
        files: those of the package that it needs, as the target has them.
        sha256: of the only one of `files`; over all their hashes where there are several (tower_hash).
        batch_sizes: rising, up to the batch that gives most per second: on a GPU, batches are filled up to one of them.
    """

    target: str
    precision: str
    runtime: str
    files: list[str]
    sha256: str
    batch_sizes: list[int]


@dataclass(frozen=True, kw_only=True)
class ImageTower(Tower):
    """Encodes images; `image_input` is "pixel_values", or "images" where it preprocesses itself."""

    image_input: str

    @property
    def inputs(self) -> list[str]:
        return [self.image_input]

    @property
    def best_batch(self) -> int:
        """That gives most images per second; DEFAULT_BATCH where none was timed."""
        return max(self.batch_sizes, default=DEFAULT_BATCH)


@dataclass(frozen=True, kw_only=True)
class TextTower(Tower):
    """Encodes texts."""

    inputs: list[str]


@dataclass(frozen=True)
class Towers:
    """Both towers of a package, also by name."""

    vision: ImageTower
    text: TextTower

    def __getitem__(self, tower: str) -> ImageTower | TextTower:
        return self.vision if tower == "vision" else self.text


@dataclass(frozen=True)
class DualEncoder:
    """Both towers, what they take and give, and how their embeddings become probabilities.

    Attributes:
        dimension: of an embedding.
        image_size: [height, width] in pixels of what the image tower takes; empty where that is patches.
        patches: [patches, values of one] of SigLIP 2 NaFlex; empty otherwise.
        vocabulary: token ids are below it.
        context_length: tokens of a text, at most; with pad_to_context always, filled up with pad_token.
        logit_scale, logit_bias, activation: of scores.Scoring.
        normalized: whether the graphs give embeddings of unit length.
        device: "cpu" or "cuda".
        requires: what pip installs to open it, beside clip-deploy, each in the version that was judged.
    """

    towers: Towers
    dimension: int
    image_size: list[int]
    vocabulary: int
    context_length: int
    pad_to_context: bool
    pad_token: int
    logit_scale: float
    logit_bias: float | None
    activation: str
    normalized: bool
    device: str
    requires: list[str]
    patches: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Package:
    """manifest.json of a package.

    Attributes:
        files: all but manifest.json, by name.
        metrics: by target, what the report says of it.
        note: why it is this that was packaged.
    """

    format: int
    origin: Provenance = field(metadata=FLAT)
    encoder: DualEncoder = field(metadata=FLAT)
    files: dict[str, File]
    metrics: dict[str, Metrics]
    note: str

    def summary(self) -> str:
        """Which target is which tower, in a line."""
        return f"vision {self.encoder.towers.vision.target}, text {self.encoder.towers.text.target}"

    def fingerprint(self, *towers: str) -> str:
        """SHA-256 over all that makes an embedding of what these towers encode; without any, of both."""
        made_by = []
        for name in towers or TOWERS:
            tower, before = self.encoder.towers[name], self.files.get(BEFORE[name])
            made_by.append([tower.runtime, tower.precision, tower.sha256, before.sha256 if before else None])
        return hashlib.sha256(json.dumps(made_by).encode()).hexdigest()


@dataclass(frozen=True)
class EmptyPackage:
    """manifest.json where nothing was packaged, for the reason that `unavailable` gives."""

    format: int
    run: Run = field(metadata=FLAT)
    unavailable: str

    def summary(self) -> str:
        return f"nothing to ship: {self.unavailable}"


class EmptyPackageError(UnavailableError):
    """Nothing was packaged, for a reason."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)  # alone, so that the error can be pickled
        self.reason = reason


@dataclass(frozen=True)
class Labels:
    """labels.json: classes and prompt templates; both may be empty."""

    classes: list[str]
    templates: list[str]


def read_labels(folder: Path) -> Labels:
    """labels.json: the classes and templates of a package. Raises ConfigError where it is of another version."""
    return read_record(Labels, folder / LABELS, AGAIN)


def read_preprocessing(folder: Path) -> Preprocessing | None:
    """None where the image tower preprocesses itself."""
    path = folder / PREPROCESSOR
    return read_record(Preprocessing, path, AGAIN) if path.is_file() else None


def tower_hash(names: Sequence[str], files: Mapping[str, File]) -> str:
    """SHA-256 of a tower by the hashes of its files: a single file's own, or over those of all."""
    hashes = [files[name].sha256 if name in files else "" for name in sorted(names)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def read_package(folder: Path) -> Package:
    """Read a package's manifest and hold its files against the hashes in it.

    Raises:
        EmptyPackageError: nothing was packaged.
        DeployError: it is no package, one of another version, or its manifest leads out of the folder.
        DiskError: a file is missing, or is not the one that was packaged.
    """
    path = folder / INSIDE
    package = parse(Package, _content(folder, path), str(path), AGAIN, null_is_nan=False)
    for name, file in package.files.items():
        _check_inside(path, name)
        _check_file(folder / name, file.sha256)
    for tower in (package.encoder.towers[name] for name in TOWERS):
        if not tower.files or tower_hash(tower.files, package.files) != tower.sha256:
            raise DeployError(
                f"{path} names {', '.join(tower.files) or 'no file'} for a tower, but has no such file with its hash: "
                f"{AGAIN}"
            )
    return package


def _content(folder: Path, path: Path) -> Any:
    """The manifest of a package of this format into which something went."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        fault = f"has no {INSIDE}" if folder.is_dir() else no_folder(folder)
        raise DeployError(
            f"{folder} is not a package (it {fault}): give the folder that `dvc repro` or `clip-deploy package` wrote, "
            "as artifacts/package"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DeployError(f"{folder} is not a package ({error}): `dvc repro package` writes one") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DeployError(f"{path} is not of format {FORMAT}, which this version reads: {AGAIN}")
    if reason := content.get("unavailable"):
        raise EmptyPackageError(f"{folder} holds nothing to ship: {reason}", str(reason))
    return content


def _check_inside(path: Path, name: str) -> None:
    """Raise DeployError where a name leads out of the package: its files are copied by their names."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise DeployError(f"{path} names {name!r}, which lies outside of the package: {AGAIN}")


def _check_file(file: Path, judged: str) -> None:
    if not file.is_file() or sha256(file) != judged:
        what = "is not the file that was packaged" if file.is_file() else "is missing"
        raise DiskError(f"{file} {what} (its hash is in {INSIDE}): package it again, or copy it again")
