"""Merge a branch whose targets were built and measured there: what both sides recorded is kept.

Line by line, git would put two runs together into records of a run that nobody made. So each stage's entry in dvc.lock,
and each file in reports/, is taken whole from one side: from the one that changed it, or from here where both did. All
else git merges; where it cannot, its conflict stays for you. `dvc repro` then runs again what does not fit the merged
settings.

examples: clip-deploy merge int8-percentile && dvc repro
          clip-deploy merge origin/main
"""

import argparse
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import dumps_yaml, parse_yaml

from clip_deploy.commands.project import PARAMS, PIPELINE, check_project, uncommitted
from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import write_text
from clip_deploy.report.revisions import commit_of, committed, git

LOCK, REPORTS = Path("dvc.lock"), Path("reports")


@dataclass
class Side:
    """What the stages wrote, as git holds it at a commit.

    Attributes:
        lock: dvc.lock.
        files: of reports/, mode and hash by path.
    """

    commit: str
    lock: dict[str, Any]
    files: dict[str, str]

    @property
    def stages(self) -> dict[str, Any]:
        return self.lock.get("stages") or {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "revision",
        metavar="REVISION",
        help="what to merge into the present branch: another branch, a revision, or an experiment's name",
    )


def run(given: argparse.Namespace) -> int:
    check_project(PARAMS, PIPELINE)
    theirs, source = commit_of(given.revision), _source()
    _check_ready()
    base = (git("merge-base", "HEAD", theirs) or "").strip()
    if not base:
        raise DeployError(f"{given.revision} and HEAD have no commit in common: give a branch of this project")
    if base == theirs:
        print(f"nothing to merge: all of {given.revision} is in HEAD")
        return 0
    if base == commit_of("HEAD"):
        _git("merge", "--quiet", "--ff-only", theirs)
        said = "nothing was committed here since, so HEAD only went forward"
    else:
        said = _merge(given.revision, source, *map(side, (base, "HEAD", theirs)))
    print(f"merged {given.revision}: {said}", flush=True)
    _bring_artifacts(source)
    print("next: `dvc repro` runs what does not fit the merged settings; then commit what it wrote")
    return 0


def _check_ready() -> None:
    if git("rev-parse", "--quiet", "--verify", "MERGE_HEAD"):
        raise DeployError("a merge has begun here: `git commit` ends it, `git merge --abort` takes it back")
    if changed := uncommitted():
        more = f" and {len(changed) - 1} files more are" if len(changed) > 1 else " is"
        raise DeployError(f"{changed[0]}{more} not committed: `git commit -am MESSAGE`, or `git stash`, first")


def side(commit: str) -> Side:
    """Raises DeployError where its dvc.lock cannot be read."""
    try:
        lock = parse_yaml(committed(LOCK, commit) or "", f"{LOCK} at {commit[:12]}")
    except DvcException as error:
        raise DeployError(f"{error}".replace("\n", " ")) from error
    listed = _git("ls-tree", "-r", "-z", commit, "--", str(REPORTS)).split("\0")
    return Side(commit, lock or {}, {path: entry for entry, _, path in (line.partition("\t") for line in listed[:-1])})


def _merge(revision: str, source: str, base: Side, ours: Side, theirs: Side) -> str:
    """Commit the merge. Returns what was taken from where.

    Raises DeployError where git refuses, with nothing changed, or leaves a conflict in other files.
    """
    done = _attempt("-c", "merge.directoryRenames=false", "merge", "--quiet", "--no-commit", "--no-ff",
                    "-m", f"Merge {revision}", theirs.commit)  # fmt: skip
    if git("rev-parse", "--quiet", "--verify", "MERGE_HEAD") is None:
        raise DeployError(f"git cannot merge {revision}: {_said(done)}")
    there, both = stages_of_sides(base.stages, ours.stages, theirs.stages)
    if lock := merged_lock(ours.lock, theirs.lock, there):
        write_text(LOCK, dumps_yaml(lock))
        _git("add", "--", str(LOCK))
    _take_reports(ours, theirs, files_of_theirs(base, ours, theirs, both))
    if conflicts := _git("diff", "--name-only", "-z", "--diff-filter=U").split("\0")[:-1]:
        raise DeployError(
            f"merged {LOCK} and {REPORTS}/, but git cannot merge {', '.join(conflicts)}: mend that and `git commit`, "
            f"then `dvc {source}` and `dvc repro`; or `git merge --abort` takes all back"
        )
    done = _attempt("commit", "--quiet", "--no-edit", "--cleanup=strip")  # git's own list of conflicts too
    if done.returncode:
        raise DeployError(
            f"all is merged, but `git commit` failed: {_said(done)}; mend that and `git commit`, or "
            "`git merge --abort` takes all back"
        )
    kept = f", and as recorded here {len(both)} that ran on both sides" if both else ""
    return f"{len(there)} stages as recorded there{kept}"


def stages_of_sides(
    base: Mapping[str, Any], ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> tuple[set[str], set[str]]:
    """The stages that they alone recorded anew, and those that both did."""
    differing = {name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)}
    there = {name for name in differing if ours.get(name) == base.get(name)}
    return there, {name for name in differing - there if theirs.get(name) != base.get(name)}


def merged_lock(ours: Mapping[str, Any], theirs: Mapping[str, Any], there: set[str]) -> dict[str, Any]:
    """Our dvc.lock with their records of some stages, or without those that they have not."""
    old, new = ours.get("stages") or {}, theirs.get("stages") or {}
    stages = {name: (new if name in there else old).get(name) for name in [*old, *(set(new) - set(old))]}
    stages = {name: entry for name, entry in stages.items() if entry is not None}
    return {**theirs, **ours, "stages": stages} if stages else {}


def files_of_theirs(base: Side, ours: Side, theirs: Side, both: set[str]) -> set[str]:
    """What they alone changed in reports/, but for results of stages that both ran: those are of one run with ours."""
    kept = {out["path"] for name in both for out in ours.stages.get(name, {}).get("outs", [])}
    return {
        path
        for path in {*ours.files, *theirs.files}
        if ours.files.get(path) != theirs.files.get(path)
        and ours.files.get(path) == base.files.get(path)
        and not any(Path(path).is_relative_to(out) for out in kept)
    }


def _take_reports(ours: Side, theirs: Side, there: set[str]) -> None:
    """Put each file of reports/ there whole, whatever git made of it."""
    now = set(_git("ls-files", "-z", "--", str(REPORTS)).split("\0")[:-1])
    taken = {
        theirs.commit: [path for path in theirs.files if path in there],
        ours.commit: [path for path in ours.files if path not in there],
    }
    for commit, paths in taken.items():
        if paths:
            _git("--literal-pathspecs", "checkout", "--quiet", commit, "--", *paths)
    if gone := now - {path for paths in taken.values() for path in paths}:
        _git("--literal-pathspecs", "rm", "--quiet", "--force", "--", *gone)


def _source() -> str:
    """The command of DVC that brings artifacts here; DeployError where DVC does not know the folder."""
    try:
        return "pull" if Repo().config["core"].get("remote") else "checkout"
    except DvcException as error:
        raise DeployError(str(error)) from error


def _bring_artifacts(source: str) -> None:
    """What is built already, from the remote or this machine's cache; what neither has is built by the next run."""
    if subprocess.run([sys.executable, "-m", "dvc", source, "--allow-missing"]).returncode:
        warnings.warn(f"`dvc {source}` failed: the next run builds what it did not bring", stacklevel=2)


def _git(*words: str) -> str:
    """What git prints; DeployError where it fails."""
    done = _attempt(*words)
    if done.returncode:
        raise DeployError(f"git failed: {_said(done)}")
    return done.stdout


def _attempt(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=False)


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stderr or done.stdout).split())
