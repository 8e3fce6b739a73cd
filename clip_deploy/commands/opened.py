"""What the commands that open a package have in common."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from clip_deploy.commands.paths import local_path
from clip_deploy.core.errors import DataError
from clip_deploy.core.manifest import INSIDE
from clip_deploy.inference.classifier import ZeroShotClassifier

PACKAGE = Path("artifacts/package")  # of a project, below its folder
UNREADABLE = 3  # exit code


def add_package_arguments(parser: argparse.ArgumentParser, takes_texts: bool = True) -> None:
    """--package, --device, --threads and, where a command takes texts, --cache, as open_package takes them."""
    parser.add_argument(
        "--package",
        type=local_path,
        default=PACKAGE,
        help="the folder that `dvc repro` or `clip-deploy package` wrote; default: %(default)s",
    )
    parser.add_argument("--device", help="cpu or cuda; default: the one that the package was made for")
    parser.add_argument("--threads", type=int, help="threads for each tower; default: the runtime decides")
    if takes_texts:
        parser.add_argument("--cache", type=local_path, help="keep the embeddings of texts in this folder")


def check_package(folder: Path) -> None:
    """Raises DataError where nothing is there; warns where the pipeline has moved on since it wrote the package."""
    if not folder.exists():
        raise DataError(
            f"there is no package {folder}: give the folder that `dvc repro` or `clip-deploy package` wrote, with "
            "--package"
        )
    warn_if_outdated(folder)


def warn_if_outdated(folder: Path) -> None:
    """One line on stderr where a project's own package is older than its params.yaml or dvc.lock.

    Three files are read as text, without DVC. A package in any other place is the one that its user chose.
    """
    package = folder.resolve()
    project = package.parent.parent
    if package == project / PACKAGE and (since := _outdated(package, project)):
        print(f"warning: {folder} is out of date: {since}; run `dvc repro`, or wait for it", file=sys.stderr)


def _outdated(package: Path, project: Path) -> str | None:
    """What changed since the package was written; None where nothing did, or this is no project."""
    try:
        model = json.loads((package / INSIDE).read_text(encoding="utf-8"))["model"]
        params, lock = ((project / name).read_text(encoding="utf-8") for name in ("params.yaml", "dvc.lock"))
    except (OSError, ValueError, KeyError, TypeError):  # what opens the package says what is wrong with it
        return None
    chosen = re.search(r"^model: *([\w.-]+)", params, re.MULTILINE)
    if chosen and chosen[1] != model:
        return f"it holds the model {model}, and params.yaml names {chosen[1]}"
    behind = _behind(lock, {*re.findall(r"[\w-]+", re.sub("#.*", "", params))})
    return f"the stage {behind} has not run since its input changed" if behind else None


def _behind(lock: str, names: set[str]) -> str | None:
    """Of dvc.lock: a stage that `package` rests on and that has not read what an earlier one made.

    DVC writes a stage's entry as it ends. Hashes of a file differ between the entries of its maker and its readers from
    then on until these have run. Entries of targets that params.yaml does not name any more stay in the file.
    """
    read, made = _hashes(lock, "deps"), _hashes(lock, "outs")
    gone = {stage for stage in made if "@" in stage and stage.partition("@")[2] not in names}
    maker = {path: (stage, md5) for stage, outs in made.items() if stage not in gone for path, md5 in outs.items()}
    waiting, seen = ["package"], {"package"}
    while waiting:
        stage = waiting.pop()
        for path, md5 in read.get(stage, {}).items():
            if path in maker and maker[path][1] != md5:
                return stage
            before = {made_by for out, (made_by, _) in maker.items() if f"{out}/".startswith(f"{path}/")} - seen
            waiting += sorted(before)
            seen |= before
    return None


def _hashes(lock: str, part: str) -> dict[str, dict[str, str]]:
    """Of each stage in dvc.lock, by path, the hashes under "deps" or "outs"."""
    found: dict[str, dict[str, str]] = {}
    stage = path = here = ""
    for line in lock.splitlines():
        if named := re.fullmatch(r"  (\S+):", line):
            stage = named[1]
        elif named := re.match(r"    (\w+):", line):
            here = named[1]
        elif named := re.fullmatch(r"    - path: (.+)", line):
            path = named[1]
        elif here == part and (named := re.fullmatch(r"      md5: (\S+)", line)):
            found.setdefault(stage, {})[path] = named[1]
    return found


def open_package(given: argparse.Namespace, **options: Any) -> ZeroShotClassifier:
    """Open it as the command line says; `options` are others of ZeroShotClassifier.open.

    Raises DeployError as that and check_package do, and where --cache is a file.
    """
    check_package(given.package)
    cache: Path | None = vars(given).get("cache")
    if cache and cache.exists() and not cache.is_dir():
        raise DataError(f"--cache is {cache}, a file: give a folder, which is made if it is not there")
    return ZeroShotClassifier.open(
        given.package, device=given.device, threads=given.threads, cache_folder=cache, **options
    )


def name_unreadable(unreadable: list[str]) -> int:
    """Say what could not be read, and return the exit code."""
    for line in unreadable:
        print(f"warning: {line}", file=sys.stderr)
    return UNREADABLE if unreadable else 0
