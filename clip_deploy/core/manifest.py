"""Whether a folder is what its manifest says: a target, a package, or the model repositories of Triton."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_deploy.core.artifact import MANIFEST_NAME, Target, differences
from clip_deploy.core.errors import DeployError
from clip_deploy.core.json_files import read_json, rounded
from clip_deploy.core.parsing import plain
from clip_deploy.core.records import Validation

INSIDE = "manifest.json"  # of packages and repositories


def verify(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The folder's manifest, and every way in which its files are not those that it names.

    A package or repository into which nothing went names none, and says why under `unavailable`.

    Raises DeployError where there is no folder or no manifest, the manifest names no files, what is read of it is not
    what a manifest holds, or the folder cannot be read.
    """
    if not folder.is_dir():
        raise DeployError(f"{folder}: no such folder; give a target's, artifacts/package or artifacts/triton")
    path = find_manifest(folder)
    manifest = read_json(path)
    if fault := _fault(manifest):
        raise DeployError(f"{path} {fault}; make it anew with `dvc repro`")
    try:
        return manifest, differences(folder, manifest.get("files", {}), INSIDE if path.name == INSIDE else None)
    except OSError as error:
        raise DeployError(f"{folder} cannot be read: {error}") from error


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
        "towers": _are(manifest.get("towers", {}), target=str, sha256=str),
    }
    return next((f"is none of ours, its {key} at least" for key, is_sound in sound.items() if not is_sound), None)


def _are(entries: Any, **types: Any) -> bool:
    """Whether it is a dictionary of dictionaries with entries of these types."""
    return isinstance(entries, dict) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in types.items())
        for entry in entries.values()
    )


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


def described(manifest: dict[str, Any]) -> str:
    """What an unchanged folder holds, in a line."""
    if "unavailable" in manifest:
        return f"holds nothing: {manifest['unavailable']}"
    size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    said = [f"files: {len(manifest['files'])}, {size:,.2f} MB"]
    origin = manifest.get("checkpoint") or {}
    said += [f"model {manifest['model']}"] if "model" in manifest else []
    said += [f"{origin['repo_id']} at {origin['revision']}"] if origin.get("repo_id") else []
    said += [
        f"{part} {known['repo_id']} at {known['revision']}"
        for part, known in origin.get("parts", {}).items()
        if part != "adapter" and known.get("repo_id")
    ]
    said += [f"{name}: gate {gate['status']}" for name, gate in manifest.get("gates", {}).items()]
    return ", ".join(said)


PROVENANCE = ("model", "seed", "versions", "checkpoint", "builds", "gates")  # in every manifest


def provenance(judged: Mapping[str, tuple[Target, Validation]], facts: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of its targets: PROVENANCE.

    Args:
        judged: by its name, each target with what validate said of it.
        facts: model, seed, versions.
    """
    first, _ = next(iter(judged.values()))
    return {
        **facts,
        "checkpoint": plain(first.model.checkpoint),
        "builds": {
            name: {"runtime": target.runtime, "precision": target.precision, "device": target.device, **target.build}
            for name, (target, _) in judged.items()
        },
        "gates": {
            name: {
                "status": record.status,
                "reasons": record.reasons,
                "precision": record.precision,
                **rounded(plain(record.limits)),
            }
            for name, (_, record) in judged.items()
        },
    }
