"""Say what `dvc repro` would run, and why.

Before a run, it compares what is here with dvc.lock. After a run, --since HEAD compares dvc.lock with the last
commit's. It prints what changed (old -> new), the stages that read it, and the stages after them. A later stage runs
only if its input files come out different.

examples: clip-deploy why ort-int8-static
          clip-deploy why --since HEAD
"""

import argparse
import hashlib
import json
from functools import cache, reduce
from pathlib import Path
from typing import Any

from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.utils.serialize import parse_yaml

from clip_deploy.commands.project import PARAMS, PIPELINE, PROBED, check_project, probed
from clip_deploy.core.errors import DeployError
from clip_deploy.report.revisions import commit_of, committed, git
from clip_deploy.report.why import Stage, explain

LOCK = "dvc.lock"
COMMAND = "the command in dvc.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", metavar="TARGET", help="a target or a stage: show only what concerns it")
    parser.add_argument("--since", metavar="REVISION", help="show what ran since this git revision")


def run(given: argparse.Namespace) -> int:
    check_project(PARAMS, PIPELINE)
    try:
        stages = since(Repo(), given.since) if given.since else pending(Repo())
    except LockError as error:
        raise DeployError("a `dvc` command is running in this project: ask again when it has ended") from error
    except DvcException as error:
        raise DeployError(str(error)) from error
    print(explain(stages, given.target))
    return 0


def pending(repo: Repo) -> dict[str, Stage]:
    """The stages as they last ran, and what changed since."""
    now, lock, status = probed(), entries(here(LOCK)), repo.status()
    stages = outlined(repo)
    for known in repo.index.stages:
        name, stage = known.addressing, stages[known.addressing]
        if name not in lock:
            stage.is_new = True
            continue
        params = {dep.def_path: dep for dep in known.deps if isinstance(dep, ParamsDependency)}
        stage.old = lock[name]["params"]
        stage.new = {path: values(now.get(path), dep) for path, dep in params.items()}
        stage.files, lost = words(status.get(name, []), set(params))
        open_probed(stage, lock[name]["deps"], now, "HEAD")
        stage.is_cached = bool(lost) and not stage.files and stage.old == stage.new and known.already_cached()
        stage.files = within(stage.files) | lost
    return stages


def since(repo: Repo, revision: str) -> dict[str, Stage]:
    """The stages as they were recorded at a git revision and are recorded now."""
    commit = commit_of(revision)
    then, now, stages = entries(committed(Path(LOCK), commit) or ""), entries(here(LOCK)), outlined(repo)
    for name, stage in stages.items():
        old, new = then.get(name), now.get(name)
        stage.has_run, stage.is_new = old != new, old is None
        if old and new:
            stage.old, stage.new = old["params"], new["params"]
            stage.files = differing(old["deps"], new["deps"]) | differing(old["cmd"], new["cmd"])
            if stage.has_run and not stage.files and stage.old == stage.new:
                stage.files = differing(old["outs"], new["outs"])  # run by force, or alone
            open_probed(stage, old["deps"], {path: json.loads(here(path) or "{}") for path in PROBED}, commit)
    return stages


def outlined(repo: Repo) -> dict[str, Stage]:
    """The stages in their order, with what each writes and waits for."""
    graph = repo.index.graph
    return {
        stage.addressing: Stage(
            {before.addressing for before in graph.successors(stage)}, [out.def_path for out in stage.outs]
        )
        for stage in repo.index.stages
    }


def entries(lock: str) -> dict[str, Any]:
    """The stages of a dvc.lock: paths with their hashes, and settings."""
    return {
        name: {
            "cmd": {COMMAND: entry["cmd"]},
            "params": entry.get("params", {}),
            **{kind: {item["path"]: item.get("md5") for item in entry.get(kind, [])} for kind in ("deps", "outs")},
        }
        for name, entry in parse_yaml(lock, LOCK).get("stages", {}).items()
    }


def words(status: list[Any], settings: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What DVC says of the files that a stage reads, and of those that it wrote."""
    said = {kind: paths for part in status if isinstance(part, dict) for kind, paths in part.items()}
    read = {path: word for path, word in said.get("changed deps", {}).items() if path not in settings}
    command = {COMMAND: "modified"} if "changed command" in status else {}
    return read | command, said.get("changed outs", {})


def within(files: dict[str, str]) -> dict[str, str]:
    """The same with the files of a folder that git sees changed, where it sees any."""
    found: dict[str, str] = {}
    for path, word in files.items():
        names = uncommitted(path) if Path(path).is_dir() else []
        found |= dict.fromkeys(names or [path], word)
    return found


@cache
def uncommitted(folder: str) -> list[str]:
    """Files below a folder that differ from the last commit's, as paths from here; git's untracked ones aside."""
    return (git("diff", "--name-only", "--relative", "HEAD", "--", folder) or "").splitlines()


def differing(old: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    """By path, "modified" or "new", what `new` has in another version than `old`; both map paths to hashes."""
    return {path: "modified" if path in old else "new" for path in new if old.get(path) != new[path]}


def values(probed: dict[str, Any] | None, dep: ParamsDependency) -> dict[str, Any]:
    """What a stage would read from a file of settings now."""
    if probed is None:
        found: dict[str, Any] = dep.read_params()
        return found
    return {key: reduce(lambda part, name: part[name], key.split("."), probed) for key in dep.params} or probed


def open_probed(stage: Stage, recorded: dict[str, str], now: dict[str, Any], revision: str) -> None:
    """Compare, for a stage that reads a whole file of the probe, what is in it."""
    for path in set(PROBED) & set(recorded):
        for text in (here(path), committed(Path(path), revision) or ""):
            if hashlib.md5(text.encode()).hexdigest() == recorded[path]:
                stage.old, stage.new = stage.old | {path: json.loads(text)}, stage.new | {path: now[path]}
                stage.files.pop(path, None)


def here(path: str) -> str:
    """A file's text; empty where there is none."""
    return Path(path).read_text() if Path(path).is_file() else ""
