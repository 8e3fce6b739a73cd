"""A package's manifest: read once, after its files were held against it, for all who open or serve the package."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from clip_deploy.core.errors import DeployError, DiskError, UnavailableError
from clip_deploy.core.files import no_folder, sha256
from clip_deploy.core.manifest import INSIDE, File, Provenance, Run
from clip_deploy.core.parsing import FLAT, parse, read_record
from clip_deploy.core.preprocessing import Preprocessing
from clip_deploy.core.records import Metrics

FORMAT = 1  # of manifest.json
LABELS, PREPROCESSOR = "labels.json", "preprocessor.json"
AGAIN = "package it anew with `dvc repro package`"


@dataclass(frozen=True)
class ImageTower:
    """The target that encodes images; `image_input` is "pixel_values", or "images" where it preprocesses itself."""

    target: str
    precision: str
    file: str
    image_input: str
    sha256: str

    @property
    def inputs(self) -> list[str]:
        return [self.image_input]


@dataclass(frozen=True)
class TextTower:
    """The target that encodes texts."""

    target: str
    precision: str
    file: str
    inputs: list[str]
    sha256: str


@dataclass(frozen=True)
class Towers:
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
        context_length: tokens of a text, at most; with pad_to_context always, filled up with pad_token.
        logit_scale, logit_bias, activation: of scores.Scoring.
        normalized: whether the graphs give embeddings of unit length.
        device: "cpu" or "cuda".
    """

    towers: Towers
    dimension: int
    image_size: list[int]
    context_length: int
    pad_to_context: bool
    pad_token: int
    logit_scale: float
    logit_bias: float | None
    activation: str
    normalized: bool
    device: str
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

    def fingerprint(self, *parts: str) -> str:
        """SHA-256 over the hashes of the files whose names begin with one of `parts`.

        Without any it is of all that makes an embedding of an image or a text.
        """
        names = parts or ("vision", "preprocessor", "text", "tokenizer")
        files = sorted((name, file.sha256) for name, file in self.files.items() if name.startswith(names))
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()


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
    return read_record(Labels, folder / LABELS, AGAIN)


def read_preprocessing(folder: Path) -> Preprocessing | None:
    """None where the image tower preprocesses itself."""
    path = folder / PREPROCESSOR
    return read_record(Preprocessing, path, AGAIN) if path.is_file() else None


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
    for tower in (package.encoder.towers.vision, package.encoder.towers.text):
        if package.files.get(tower.file, File("", 0)).sha256 != tower.sha256:
            raise DeployError(f"{path} names {tower.file} for a tower, and no file of that name and hash: {AGAIN}")
    return package


def _content(folder: Path, path: Path) -> Any:
    """The manifest of a package of this format into which something went."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        fault = f"has no {INSIDE}" if folder.is_dir() else no_folder(folder)
        raise DeployError(
            f"{folder} is no package (it {fault}): give the folder that `dvc repro` or `clip-deploy package` wrote, as "
            "artifacts/package"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DeployError(f"{folder} is no package ({error}): `dvc repro package` writes one") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DeployError(f"{path} has no format {FORMAT}, which this version reads: {AGAIN}")
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
        raise DiskError(f"{file} {what} (its hash is in {INSIDE}): package or copy it anew")
