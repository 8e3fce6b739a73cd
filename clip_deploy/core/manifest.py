"""What a manifest says of a target, a package or Triton's model repositories, and whether the folder is that."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_deploy.core.artifact import MANIFEST_NAME, FileFacts, Target, differences, hashes
from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import no_folder, write_text
from clip_deploy.core.json_files import read_json, rounded
from clip_deploy.core.model import Origin
from clip_deploy.core.parsing import FLAT, plain
from clip_deploy.core.records import Facts, Limit, PairVerdict, Validation

INSIDE = "manifest.json"  # of packages, repositories and prepared sets


@dataclass(frozen=True)
class File:
    """A file by its content."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Run:
    """One run of the pipeline: its model's name, its seed, and the versions of its libraries, None where missing."""

    model: str
    seed: int
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Gate:
    """What validate said of a target, with what was held against each limit; no limit where it could not be run."""

    status: str
    reasons: list[str]
    precision: str
    min_cosine: Limit | None = None
    max_top1_drop: Limit | None = None
    max_flips: Limit | None = None


@dataclass(frozen=True)
class Provenance:
    """Where targets come from, and how they were judged; in every manifest.

    Attributes:
        checkpoint: hub id, revision and SHA-256; None where nothing could be built.
        builds: by target, how it was made.
        gates: by target, or by the name of a pair of targets.
    """

    run: Run = field(metadata=FLAT)
    checkpoint: Origin | None
    builds: dict[str, Facts]
    gates: dict[str, Gate | PairVerdict]


@dataclass(frozen=True)
class TargetManifest:
    """artifacts/<target>.manifest.json."""

    format: int
    target: str
    origin: Provenance = field(metadata=FLAT)
    files: dict[str, File]


@dataclass(frozen=True)
class PackagedTower:
    """A tower of a package: its target, and its files there."""

    target: str
    files: list[str]


@dataclass(frozen=True)
class Manifest:
    """What is read of any manifest: a target's, a package's, Triton's repositories' or that of prepared data.

    Attributes:
        files: by their names.
        unavailable: why there are none.
        model: the name that the run gave it.
        sources: hub ids with their revisions: "" of the checkpoint, and of the parts that it was put together from.
        gates: what validate said, by target or pair of targets.
        towers: of a package.
    """

    files: dict[str, FileFacts]
    unavailable: str | None
    model: str | None
    sources: dict[str, str]
    gates: dict[str, str]
    towers: dict[str, PackagedTower]


def verify(folder: Path) -> tuple[Manifest, list[str]]:
    """The folder's manifest, and every way in which its files are not those that it names.

    A package or repository into which nothing went names none, and says why under `unavailable`.

    Raises DeployError where there is no folder or no manifest, the manifest names no files, what is read of it is not
    what a manifest holds, or the folder cannot be read.
    """
    if not folder.is_dir():
        raise DeployError(f"{folder} {no_folder(folder)}; give a target's, artifacts/package or artifacts/triton")
    path = find_manifest(folder)
    manifest = read_manifest(path)
    try:
        return manifest, differences(folder, manifest.files, INSIDE if path.name == INSIDE else None)
    except OSError as error:
        raise DeployError(f"{folder} cannot be read: {error}") from error


def read_manifest(path: Path) -> Manifest:
    """Any manifest, which may come from anywhere. Raises DeployError where it is none of ours."""
    content = read_json(path)
    if fault := _fault(content):
        raise DeployError(f"{path} {fault}; make it again with `dvc repro`")
    checkpoint = content.get("checkpoint") or {}
    origins = {"": checkpoint, **checkpoint.get("parts", {})}
    return Manifest(
        content.get("files", {}),
        content.get("unavailable"),
        content.get("model"),
        {part: f"{known['repo_id']} at {known['revision']}" for part, known in origins.items() if known.get("repo_id")},
        {name: gate["status"] for name, gate in content.get("gates", {}).items()},
        {
            tower: PackagedTower(entry["target"], entry.get("files", []))
            for tower, entry in content.get("towers", {}).items()
        },
    )


def _fault(manifest: Any) -> str | None:
    """What of a manifest is not as `dvc repro` writes it, among what is read here and by the gate."""
    if not isinstance(manifest, dict) or not _are(manifest.get("files", {}), sha256=str, bytes=int):
        return "names no files"
    if not manifest.get("files") and "unavailable" not in manifest:
        return "names no files"
    checkpoint = manifest.get("checkpoint") or {}
    parts = checkpoint.get("parts", {}) if isinstance(checkpoint, dict) else {}
    sound = {
        "unavailable": isinstance(manifest.get("unavailable", ""), str),
        "model": isinstance(manifest.get("model", ""), str),
        "checkpoint": all(_are(known, repo_id=str | None, revision=str | None) for known in ({"": checkpoint}, parts)),
        "gates": _are(manifest.get("gates", {}), status=str),
        "towers": _are(manifest.get("towers", {}), target=str, sha256=str)
        and all(_are_names(tower.get("files", [])) for tower in manifest.get("towers", {}).values()),
    }
    unsound = next((key for key, is_sound in sound.items() if not is_sound), None)
    return unsound and f"is not a manifest of clip-deploy (its {unsound} is of another kind)"


def _are(entries: Any, **types: Any) -> bool:
    """Whether it is a dictionary of dictionaries with entries of these types."""
    return isinstance(entries, dict) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in types.items())
        for entry in entries.values()
    )


def _are_names(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


def find_manifest(folder: Path) -> Path:
    """A target's and that of prepared data lie beside their folders, and come first: what lies inside is their own."""
    whole = folder.resolve()  # of "." the name is wanted too
    known = [whole.with_name(MANIFEST_NAME.format(whole.name)), whole / INSIDE]
    for path in known:
        if path.is_file():
            return path
    raise DeployError(
        f"{folder} has no manifest, neither {known[0].name} beside it nor {INSIDE} inside: copy it along with the "
        "folder, or run `dvc repro`, which writes both"
    )


def described(manifest: Manifest) -> str:
    """What an unchanged folder holds, in a line."""
    if manifest.unavailable is not None:
        return f"holds nothing: {manifest.unavailable}"
    size = sum(int(facts["bytes"]) for facts in manifest.files.values()) / 1e6
    said = [f"files: {len(manifest.files)}, {size:,.2f} MB"]
    said += [f"model {manifest.model}"] if manifest.model is not None else []
    said += [f"{part} {source}".strip() for part, source in manifest.sources.items() if part != "adapter"]
    said += [f"{name}: gate {status}" for name, status in manifest.gates.items()]
    return ", ".join(said)


def provenance(judged: Mapping[str, tuple[Target, Validation]], run: Run) -> Provenance:
    """What a manifest says of its targets; `judged` has by its name each target with what validate said of it."""
    first, _ = next(iter(judged.values()))
    return Provenance(
        run=run,
        checkpoint=first.model.checkpoint,
        builds={
            name: {"runtime": target.runtime, "precision": target.precision, "device": target.device, **target.build}
            for name, (target, _) in judged.items()
        },
        gates={
            name: Gate(record.status, record.reasons, record.precision, **record.limits)
            for name, (_, record) in judged.items()
        },
    )


def files_of(folder: Path, known: Mapping[str, str] = {}) -> dict[str, File]:
    """What `artifact.hashes` says of every file below `folder`."""
    return {name: File(str(facts["sha256"]), int(facts["bytes"])) for name, facts in hashes(folder, known).items()}


def save_manifest(path: Path, manifest: object, indent: int, ensure_ascii: bool = True) -> None:
    """Write a dataclass as a manifest; what was measured for its gates is rounded, all else stands as it is."""
    content = plain(manifest)
    if "gates" in content:
        content["gates"] = rounded(content["gates"])
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=ensure_ascii) + "\n")
