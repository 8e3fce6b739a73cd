"""Whether a folder is what its manifest says: a target, a package, or the model repositories of Triton."""

from pathlib import Path
from typing import Any

from clip_deploy.core.artifact import differences
from clip_deploy.core.errors import DeployError
from clip_deploy.core.results import read_json

INSIDE, BESIDE = "manifest.json", "{}.manifest.json"  # of packages and repositories; of targets


def verify(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The folder's manifest, and every way in which its files are not those that it names.

    A package or repository into which nothing went names none, and says why under `unavailable`.

    Raises DeployError where there is no folder or no manifest, or the manifest names no files.
    """
    if not folder.is_dir():
        raise DeployError(f"{folder}: no such folder; give a target's, artifacts/package or artifacts/triton")
    path = find_manifest(folder)
    manifest = read_json(path)
    entries = manifest if isinstance(manifest, dict) else {}
    files = entries.get("files", {} if "unavailable" in entries else None)
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        raise DeployError(f"{path} names no files; make it anew with `dvc repro`")
    return entries, differences(folder, files, INSIDE if path.name == INSIDE else None)


def find_manifest(folder: Path) -> Path:
    """A target's lies beside its folder, and comes first: what lies inside is the target's own."""
    whole = folder.resolve()  # of "." the name is wanted too
    known = [whole.with_name(BESIDE.format(whole.name)), whole / INSIDE]
    for path in known:
        if path.is_file():
            return path
    raise DeployError(
        f"{folder} has no manifest, neither {known[0].name} beside it nor {INSIDE} inside: copy it along with the "
        "folder, or run `dvc repro`, which writes both"
    )


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)


def described(manifest: dict[str, Any]) -> str:
    """What an unchanged folder holds, in a line."""
    if "files" not in manifest:
        return f"holds nothing: {manifest['unavailable']}"
    size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    said = [f"files: {len(manifest['files'])}, {size:,.2f} MB"]
    origin = manifest.get("checkpoint") or {}
    said += [f"model {manifest['model']}"] if "model" in manifest else []
    said += [f"{origin['repo_id']} at {origin['revision']}"] if origin.get("repo_id") else []
    said += [f"gate {manifest['gate']['status']}"] if "gate" in manifest else []
    return ", ".join(said)
