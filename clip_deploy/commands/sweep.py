"""Measure a target at every point of a grid of settings, each as a DVC experiment.

conf/sweep/NAME.yaml names the target and, for each parameter of params.yaml or conf/, its values. reports/sweep.md has
the points, and what each value does. What was measured is not run again: the same command goes on after a stop. A point
that fails keeps its row and the reason; --again tries it once more.

examples: clip-deploy sweep int8
          clip-deploy sweep int8 --show        # the table of what was measured so far
          dvc exp apply int8-3f2a9c01          # its settings and results into the workspace
"""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dvc.utils.hydra import apply_overrides

from clip_deploy.commands.project import CONF, PARAMS, PIPELINE, check_project
from clip_deploy.core.config import find_choice, load_params, read_yaml, typed
from clip_deploy.core.errors import ConfigError, DeployError
from clip_deploy.core.files import write_text
from clip_deploy.core.json_files import read_json, write_json
from clip_deploy.core.subprocesses import die_with_parent
from clip_deploy.report.ci_gate import at_revision
from clip_deploy.report.revisions import git
from clip_deploy.report.sweep import Point, as_markdown, row_at

REPORTS, OUTPUT = Path("reports"), Path("reports/sweep.md")
FAILED = Path(".dvc/tmp/sweeps")  # beside DVC's own temporary files: reasons, by the points' names


@dataclass
class Sweep:
    """conf/sweep/NAME.yaml.

    Attributes:
        target: what is built, checked and timed at each point.
        parameters: of each, by its key in params.yaml, or `conf/FILE:KEY`, the values.
    """

    target: str = ""
    parameters: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.target or not self.parameters or not all(self.parameters.values()):
            raise ConfigError("give a target, and parameters with at least one value each")

    def points(self, name: str) -> list[Point]:
        """Every combination of values, the last parameter's changing first."""
        values = itertools.product(*self.parameters.values())
        return [_point(name, dict(zip(self.parameters, each, strict=True))) for each in values]


def _point(name: str, settings: dict[str, Any]) -> Point:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Point(f"{name}-{digest}", settings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of a file in conf/sweep/")
    parser.add_argument("--show", action="store_true", help="run nothing: write and print what was measured so far")
    parser.add_argument("--again", action="store_true", help="try points again that failed")


def run(given: argparse.Namespace) -> int:
    check_project(PARAMS, CONF, PIPELINE)
    sweep = read_sweep(given.name)
    points = sweep.points(given.name)
    for point in points:
        check_point(point, sweep.target)
    if not given.show:
        _check_clean()
        _measure(points, sweep.target, given.again)
    found = [known(point, sweep.target) for point in points]
    text = as_markdown(given.name, sweep.target, found)
    write_text(OUTPUT, text)
    print(text)
    failed = [point.name for point in found if point.failed]
    if failed and not given.show:
        raise DeployError(f"{len(failed)} of {len(points)} points failed: {', '.join(failed)}; {OUTPUT} says why")
    return 0


def read_sweep(name: str) -> Sweep:
    path = find_choice(CONF, "sweep", name)
    found: Sweep = typed(Sweep, read_yaml(path), str(path))
    return found


def check_point(point: Point, target: str) -> None:
    """Raises ConfigError where its settings are none, before any point is built."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for path in (PARAMS, *sorted(CONF.rglob("*.yaml"))):
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_bytes(path.read_bytes())
        for file, words in overrides(point).items():
            if not (copy / file).is_file():
                raise ConfigError(f"{point.name}: there is no {file}; parameters are keys of {PARAMS}, or FILE:KEY")
            try:
                apply_overrides(copy / file, words)
            except Exception as error:  # DVC's own, with Hydra's as its cause
                raise ConfigError(f"{point.name}: {error.__cause__ or error} ({file})".replace("\n", " ")) from error
        try:
            params = load_params(copy / PARAMS, copy / CONF)
        except ConfigError as error:
            raise ConfigError(f"{point.name}: {error}".replace(f"{copy}/", "")) from error
    if target not in params.targets:
        raise ConfigError(f"{point.name}: target is {target!r}, not among targets: {', '.join(params.targets)}")


def overrides(point: Point) -> dict[str, list[str]]:
    """By file, ++KEY=VALUE as Hydra reads it: also where the file leaves the key to its default."""
    found: dict[str, list[str]] = {}
    for parameter, value in point.settings.items():
        file, _, key = parameter.rpartition(":")
        found.setdefault(file or str(PARAMS), []).append(f"++{key}={_written(value)}")
    return found


def _written(value: Any) -> str:
    """A value in Hydra's grammar, of which JSON is nearly a part."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(item)}' for key, item in value.items())}}}"
    return "null" if value is None else json.dumps(value)


def _check_clean() -> None:
    """Each experiment begins at HEAD, with what is changed in the workspace: that would be in none's name."""
    if git("rev-parse", "HEAD") is None:
        raise DeployError("there is no commit here, from which the experiments of a sweep begin: commit first")
    changed = [line for line in (git("status", "--porcelain", "-uno") or "").splitlines() if str(OUTPUT) not in line]
    if changed:
        raise DeployError(f"{changed[0][3:]} is not committed: a sweep begins at a commit, so that its rows compare")


def _measure(points: Sequence[Point], target: str, again: bool) -> None:
    for number, point in enumerate(points, 1):
        said = f"{number} of {len(points)}: {point.name} " + ", ".join(f"{k}={v}" for k, v in point.settings.items())
        if _commit(point) or (_reason(point) and not again):
            print(f"{said}: there already", flush=True)
            continue
        print(said, flush=True)
        words = [word for file, each in overrides(point).items() for word in _set(file, each)]
        command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", point.name, *words]
        command += [f"validate@{target}", f"benchmark@{target}", "benchmark@torch-fp32"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              preexec_fn=die_with_parent)  # fmt: skip
        _keep(point, None if done.returncode == 0 else _last_error(done.stdout))


def _set(file: str, words: Sequence[str]) -> list[str]:
    place = "" if file == str(PARAMS) else f"{file}:"
    return [word for each in words for word in ("-S", f"{place}{each}")]


def _last_error(text: str) -> str:
    """The line in which a stage says why, or else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no word"])[-1].removeprefix("error: ")


def known(point: Point, target: str) -> Point:
    """With what its experiment holds, or why it failed."""
    commit = _commit(point)
    row = row_at(target, at_revision(commit, REPORTS)) if commit else None
    return Point(point.name, point.settings, row, None if row else _reason(point))


def _commit(point: Point) -> str | None:
    """Of the experiment of that name which began at what HEAD holds."""
    lines = (git("for-each-ref", "--format=%(objectname) %(refname)", f"refs/exps/*/*/{point.name}") or "").splitlines()
    for line in lines:
        commit, reference = line.split(" ", 1)
        start, end = reference.split("/")[2:4]
        if state(start + end) == state("HEAD"):
            return commit
    return None


@cache
def state(commit: str) -> str:
    """Of all files but the sweep's own table, which one may commit without that its points are measured again."""
    lines = (git("ls-tree", "-r", commit) or "").splitlines()
    return hashlib.sha256("\n".join(line for line in lines if not line.endswith(f"\t{OUTPUT}")).encode()).hexdigest()


def _keep(point: Point, reason: str | None) -> None:
    path = _path(point)
    if reason is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, {"reason": reason})


def _reason(point: Point) -> str | None:
    path = _path(point)
    return str(read_json(path)["reason"]) if path.is_file() else None


def _path(point: Point) -> Path:
    """Points of other code or settings fail for themselves."""
    return FAILED / state("HEAD") / f"{point.name}.json"
