"""Add a repository's models to one that is served, as its next version, and take a version back.

Triton loads a model's versions one model at a time, and an ensemble whose parts are missing goes out of service. So the
parts come first, one by one, and clip_zero_shot, which names the version of every part, follows once all of them are
there; back it goes the other way round. A part that is refused changes nothing. It needs no library: it runs where the
repository lies.
"""

import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clip_deploy.core.artifact import differences
from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import disk_errors, new_folder, no_folder, write_text
from clip_deploy.core.manifest import INSIDE, read_manifest

PARTS = ("clip_preprocess", "clip_tokenize", "clip_score", "clip_vision", "clip_text")
WHOLE = "clip_zero_shot"
CONFIG = "config.pbtxt"
REPOSITORIES = "artifacts/triton/onnxruntime or artifacts/triton/python"
WRITTEN = "1"  # the version that repository.py writes
LOAD_S = 300.0  # until a server must have loaded a model, warm-up included
TENSORS = re.compile(r"^(?:input|output) \{\n(?:  .*\n)*\}|^(?:backend|platform): .*|^ *dims: .*", re.MULTILINE)


def publish(new: Path, served: Path, url: str | None = None) -> str:
    """Add version 1 of `new` to `served` as the next version. Returns its number.

    Args:
        new: one backend's repository, as write_repository lays it out.
        served: a copy of such a repository, with any versions.
        url: of the server's HTTP port, which then loads it; without, a server takes it at its next start.

    Raises DeployError where `new` is damaged, takes or gives other tensors than `served`, or the server refuses a part;
    `served` is then as it was, and so is what the server answers.
    """
    _check_whole(new)
    if served.exists() and served.samefile(new):
        raise DeployError(
            f"{served} is the repository itself, which the pipeline made: give a copy of it, as `cp -rL` makes"
        )
    version = str(max(map(int, versions(served))) + 1)
    _check_alike(new, served)
    before = {model: (served / model / CONFIG).read_text(encoding="utf-8") for model in (WHOLE, *PARTS)}
    try:
        for models in (PARTS, (WHOLE,)):
            for model in models:
                _put(new, served, model, version)
            load(url, models)
    except BaseException:
        for model, config in before.items():
            _remove(served / model / version)
            _configure(served, model, config)
        for model in (*PARTS, WHOLE):
            with suppress(DeployError):  # the first error is the one to tell
                load(url, (model,))
        raise
    return version


def withdraw(served: Path, version: str, url: str | None = None) -> str:
    """Take a version out of `served`, and out of the server at `url`. Returns the newest that is left.

    Raises DeployError where there is no such version, or no other, or the server does not take it out of
    clip_zero_shot; `served` is then as it was, and so is what the server answers.
    """
    known = versions(served)
    left = [other for other in known if other != version]
    if version not in known or not left:
        raise DeployError(f"{served} has version {', '.join(known)}: {version} cannot be taken out of it")
    before = (served / WHOLE / CONFIG).read_text(encoding="utf-8")
    try:
        with _aside(served / WHOLE / version):
            _configure(served, WHOLE, _pinned(before, left[-1]))
            load(url, (WHOLE,))
    except BaseException:
        _configure(served, WHOLE, before)
        with suppress(DeployError):  # the first error is the one to tell
            load(url, (WHOLE,))
        raise
    for part in PARTS:
        _remove(served / part / version)
    load(url, PARTS)
    return left[-1]


def versions(served: Path) -> list[str]:
    """Numbers of the folders that any model has, the newest last. Raises DeployError where it is no such repository."""
    lacking = [model for model in (*PARTS, WHOLE) if not (served / model / CONFIG).is_file()]
    found = {path.name for model in (*PARTS, WHOLE) for path in (served / model).glob("[0-9]*") if path.name.isdigit()}
    if lacking or not found:
        what = f"has no {lacking[0]}/{CONFIG}" if lacking else "has no version"
        raise DeployError(f"{served} {what if served.is_dir() else no_folder(served)}: give a copy of {REPOSITORIES}")
    return sorted(found, key=int)


def _check_whole(new: Path) -> None:
    """Hold a repository's files against the manifest beside it."""
    is_made = (new.parent / INSIDE).is_file()
    if not new.is_dir() or not is_made:
        what = f"has no {INSIDE} beside it" if new.is_dir() else no_folder(new)
        beside = [str(path.parent) for path in sorted(new.parent.glob(f"*/{WHOLE}"))] if is_made else []
        raise DeployError(f"{new} {what}: give {' or '.join(beside) or REPOSITORIES}")
    files, within = read_manifest(new.parent / INSIDE).files, f"{new.name}/"
    inside = {name.removeprefix(within): facts for name, facts in files.items() if name.startswith(within)}
    if found := differences(new, inside):
        raise DeployError(f"{new}/{found[0]} (by manifest.json beside it): build it again with `dvc repro`")
    versions(new)


def _check_alike(new: Path, served: Path) -> None:
    for model in (*PARTS, WHOLE):
        mine, theirs = ((folder / model / CONFIG).read_text(encoding="utf-8") for folder in (new, served))
        if set(TENSORS.findall(mine)) != set(TENSORS.findall(theirs)):
            raise DeployError(
                f"{model} of {new} has another backend or other tensors than that of {served}, and all versions of a "
                "model share one config.pbtxt: serve it from a folder of its own"
            )


def _put(new: Path, served: Path, model: str, version: str) -> None:
    """A version appears whole; batching and instances are the new one's, for all versions."""
    with new_folder(served / model / version) as folder:
        shutil.copytree(new / model / WRITTEN, folder, dirs_exist_ok=True)
    config = (new / model / CONFIG).read_text(encoding="utf-8")
    _configure(served, model, _pinned(config, version) if model == WHOLE else config)


def _pinned(config: str, version: str) -> str:
    return re.sub(r"model_version: -?\d+", f"model_version: {version}", config)


def _configure(served: Path, model: str, config: str) -> None:
    """Written only where it is another: with a newer file, Triton loads all versions of the model again."""
    path = served / model / CONFIG
    if path.read_text(encoding="utf-8") != config:
        write_text(path, config)


@contextmanager
def _aside(version: Path) -> Iterator[None]:
    """Take a version away, for good unless what runs meanwhile fails. Triton reads folders alone that numbers name."""
    hidden = version.with_name(f".{version.name}")
    with disk_errors(version):
        if version.exists():
            version.rename(hidden)
    try:
        yield
    except BaseException:
        if hidden.exists():
            hidden.rename(version)
        raise
    _remove(hidden)


def _remove(version: Path) -> None:
    with disk_errors(version):
        if version.exists():
            shutil.rmtree(version)


def load(url: str | None, models: tuple[str, ...]) -> None:
    """Let the server look at the models again. Raises DeployError with what it says where it refuses one."""
    for model in models if url else ():
        request = urllib.request.Request(f"{url}/v2/repository/models/{model}/load", data=b"", method="POST")
        try:
            urllib.request.urlopen(request, timeout=LOAD_S).close()
        except urllib.error.HTTPError as error:
            raise DeployError(f"the server refuses {model}: {_said(error.read())}") from error
        except (OSError, ValueError) as error:
            raise DeployError(
                f"no server answers at {url} ({error}): give its address, for example http://host:8000"
            ) from error


def _said(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]).splitlines()[0]
    except (ValueError, KeyError, TypeError, IndexError):
        return body.decode(errors="replace")[:200]
