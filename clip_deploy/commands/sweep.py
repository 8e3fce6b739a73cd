"""Measure a target over a grid of settings or by a search; each point is a DVC experiment.

conf/sweep/NAME.yaml names the target, and lists the values of each parameter of params.yaml or conf/. If the file has
`search`, Optuna chooses the points among the listed values and ranges. reports/sweep.md and sweep.html show the points,
the Pareto front and the effect of each value. After a stop, the same command continues: it measures no point twice. A
point that fails keeps its row with the reason; --again tries it again.

examples: clip-deploy sweep int8
          clip-deploy sweep int8 --show        # the table of what was measured so far
          clip-deploy sweep int8 --on slurm    # each point is a job of the cluster
          dvc exp apply int8-3f2a9c01          # takes a point's settings and results into params.yaml and reports/
"""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dvc.utils.hydra import apply_overrides

from clip_deploy.commands.project import CONF, PARAMS, PIPELINE, check_project, uncommitted
from clip_deploy.commands.sweep_leftovers import only_one
from clip_deploy.commands.sweep_search import Chooser, Range, Search
from clip_deploy.commands.sweep_workers import (
    ENGINES,
    Engine,
    Job,
    answered,
    fetch,
    last_error,
    open_engine,
    repository,
)
from clip_deploy.core.config import find_choice, load_params, read_yaml, typed
from clip_deploy.core.errors import ConfigError, DataError, DeployError
from clip_deploy.core.files import write_text
from clip_deploy.core.json_files import read_json, write_json
from clip_deploy.core.subprocesses import die_with_parent
from clip_deploy.report.ci_gate import at_revision
from clip_deploy.report.revisions import git
from clip_deploy.report.sweep import Point, as_markdown, as_page, machine_at, row_at, shown

REPORTS = Path("reports")
OUTPUTS = REPORTS / "sweep.md", REPORTS / "sweep.html"
JOBS = Path(".dvc/tmp/sweep-jobs")  # submitit's files
FAILED = Path(".dvc/tmp/sweeps")  # beside DVC's own temporary files: reasons, by the points' names


@dataclass
class Sweep:
    """conf/sweep/NAME.yaml.

    Attributes:
        target: what is built, checked and timed at each point.
        parameters: of each, by its key in params.yaml, or `conf/FILE:KEY`, the values: a list, or a Range in a search.
        search: how points are chosen; None takes every combination.
        submitit: parameters of its executor for --on slurm, as timeout_min and slurm_partition.
    """

    target: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    search: Search | None = None
    submitit: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.target or not self.parameters or not all(self.parameters.values()):
            raise ConfigError("give a target, and parameters with at least one value each")
        for name, values in self.parameters.items():
            if isinstance(values, dict) and self.search:
                self.parameters[name] = _range(name, values)
            elif not isinstance(values, list):
                range_or_not = (
                    ", or low and high" if self.search else "; low and high need `search: {points: 24}` beside them"
                )
                raise ConfigError(f"parameters.{name} is {values!r}: give a list{range_or_not}")

    def points(self, name: str) -> list[Point]:
        """Every combination of the values, the last parameter's changing first."""
        return [
            _point(name, dict(zip(self.parameters, each, strict=True))) for each in itertools.product(*self._values())
        ]

    def samples(self, name: str) -> list[Point]:
        """Points in which each value comes at least once: enough to know that each is accepted."""
        values = [itertools.cycle(each) for each in self._values()]
        most = max(map(len, self._values()))
        return [_point(name, dict(zip(self.parameters, map(next, values), strict=True))) for _ in range(most)]

    def _values(self) -> list[list[Any]]:
        """Of a range its ends."""
        return [each.ends if isinstance(each, Range) else each for each in self.parameters.values()]


def _range(name: str, values: dict[str, Any]) -> Range:
    if not {"low", "high"} <= set(values) <= {"low", "high", "step", "log"}:
        raise ConfigError(f"parameters.{name} has {', '.join(values)}: accepted are low and high, with step or log")
    numbers = [value for key, value in values.items() if key != "log"]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
        raise ConfigError(f"parameters.{name} is {values!r}: low, high and step are numbers")
    try:
        return Range(**values)
    except ConfigError as error:
        raise ConfigError(f"parameters.{name}: {error}") from error


def _point(name: str, settings: dict[str, Any]) -> Point:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Point(f"{name}-{digest}", settings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the name of a file in conf/sweep/, without .yaml")
    parser.add_argument("--show", action="store_true", help="run nothing: write and print what was measured so far")
    parser.add_argument("--all", action="store_true", help="print all columns, as reports/sweep.md has them")
    parser.add_argument("--again", action="store_true", help="try failed points again")
    parser.add_argument(
        "--jobs",
        "-j",
        type=int,
        help="points of a grid at once; default: 1, on a cluster all. On one machine builds run side by side, timings "
        "never do",
    )
    parser.add_argument("--on", metavar="ENGINE", help=f"measure each point in a job elsewhere: {ENGINES}")


def run(given: argparse.Namespace) -> int:
    check_project(PARAMS, CONF, PIPELINE)
    sweep = read_sweep(given.name)
    jobs = given.jobs if given.jobs is not None else _jobs(given.on, sweep)
    if jobs < 1 or (jobs > 1 and sweep.search):
        raise DataError(
            f"--jobs is {jobs}: give 1 or more for a grid, and 1 for a search, which chooses each point by the results "
            "before it"
        )
    for point in sweep.samples(given.name) if sweep.search else sweep.points(given.name):
        try:
            check_point(point, sweep.target)
        except ConfigError as error:
            raise ConfigError(f"{CONF}/sweep/{given.name}.yaml: {error}") from error
    if given.show:
        _check_measured(given.name)
    else:
        _check_clean()
    with nullcontext(()) if given.show else only_one(given.name) as lock:
        measure = _Measuring(sweep.target, given.show, given.again, lock)
        if given.on and not given.show:
            measure.begin_elsewhere(given.on, given.name, sweep.submitit)
        if sweep.search:
            found = list(_searched(given.name, sweep, measure))
        else:
            found = _grid(sweep.points(given.name), measure, jobs)
    if given.show and not any(point.row or point.failed for point in found):
        raise DeployError(f"no point of {given.name} was measured here: `clip-deploy sweep {given.name}` measures them")
    for path, text in zip(OUTPUTS, (as_markdown, as_page), strict=True):
        write_text(path, text(given.name, sweep.target, found))
    print(as_markdown(given.name, sweep.target, found) if given.all else shown(given.name, sweep.target, found))
    failed = [point.name for point in found if point.failed]
    if failed and not given.show:
        raise DeployError(f"{len(failed)} of {len(found)} points failed: {', '.join(failed)}; {OUTPUTS[0]} says why")
    return 0


def _jobs(engine: str | None, sweep: Sweep) -> int:
    """A machine for each point where there are many; all that are asked for at once would only wait on one."""
    return len(sweep.points("")) if engine not in (None, "local") and not sweep.search else 1


def _grid(points: Sequence[Point], measure: "_Measuring", jobs: int) -> list[Point]:
    with ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(measure, point, f"{number} of {len(points)}") for number, point in enumerate(points, 1)]
        try:
            return [each.result() for each in work]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _searched(name: str, sweep: Sweep, measure: "_Measuring") -> Iterator[Point]:
    """Each point once, though the sampler may ask for it again."""
    assert sweep.search
    chooser = Chooser(sweep.parameters, sweep.search, load_params(PARAMS, CONF).recommend)
    found: dict[str, Point] = {}
    for number in range(1, sweep.search.points + 1):
        point = _point(name, chooser.ask())
        if point.name not in found:
            found[point.name] = measure(point, f"{number} of {sweep.search.points}")
            yield found[point.name]
        point = found[point.name]
        if point.row is None and point.failed is None:  # only shown, and not measured yet
            return
        chooser.tell(point.row)


def read_sweep(name: str) -> Sweep:
    """conf/sweep/NAME.yaml. Raises ConfigError where there is none, or it holds anything else than a sweep."""
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
        raise DeployError("this repository has no commit, and the experiments of a sweep begin at one: commit first")
    if changed := [path for path in uncommitted() if Path(path) not in OUTPUTS]:
        more = f" and {len(changed) - 1} files more are" if len(changed) > 1 else " is"
        raise DeployError(
            f"{changed[0]}{more} not committed: a sweep begins at a commit, so that its rows compare; "
            "`git commit -am MESSAGE` makes one"
        )


def _check_measured(name: str) -> None:
    """Raises DeployError where points were measured at other commits alone: their table would be lost."""
    starts = [start for _, start in _experiments(f"{name}-*")]
    if starts and not any(state(start) == state("HEAD") for start in starts):
        raise DeployError(
            f"no point of {name} was measured at HEAD, and {len(starts)} at {starts[-1][:12]}: `git switch --detach "
            f"{starts[-1][:12]}` shows those; without --show the sweep measures them here"
        )


@dataclass
class _Measuring:
    """Runs a point's experiment, unless that is there already or it is only shown."""

    target: str
    show: bool
    again: bool
    lock: tuple[int, ...] = ()  # descriptors that hold the sweep as long as one of its runs lives
    engine: Engine | None = None  # None: here
    source: str = ""  # what its jobs clone
    start: str = ""  # the commit that they check out

    def __call__(self, point: Point, number: str) -> Point:
        if not self.show:
            said = f"{number}: {point.name} " + ", ".join(f"{key}={value}" for key, value in point.settings.items())
            is_there = _commit(point) or (_reason(point) and not self.again)
            print(f"{said}: there already" if is_there else said, flush=True)
            if not is_there:
                self._run(point)
        return known(point, self.target)

    def begin_elsewhere(self, engine: str, name: str, parameters: dict[str, Any]) -> None:
        """Give points to an engine from now on; what its jobs have measured already is taken over."""
        self.source, self.start = repository(), str(git("rev-parse", "HEAD")).strip()
        fetch(self.source, self.start, f"{name}-*")
        self.engine = open_engine(engine, JOBS, parameters)

    def _run(self, point: Point) -> None:
        words = [word for file, each in overrides(point).items() for word in _set(file, each)]
        words += [f"validate@{self.target}", f"benchmark@{self.target}", "benchmark@torch-fp32"]
        if self.engine:
            _keep(point, answered(self.engine, Job(self.source, self.start, point.name, tuple(words))))
            fetch(self.source, self.start, f"{point.name}*")  # a pattern: there is none where it failed
            return
        command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", point.name, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              preexec_fn=die_with_parent, pass_fds=self.lock)  # fmt: skip
        _keep(point, None if done.returncode == 0 else last_error(done.stdout))


def _set(file: str, words: Sequence[str]) -> list[str]:
    place = "" if file == str(PARAMS) else f"{file}:"
    return [word for each in words for word in ("-S", f"{place}{each}")]


def known(point: Point, target: str) -> Point:
    """With what its experiment holds, or why it failed."""
    commit = _commit(point)
    reports = at_revision(commit, REPORTS) if commit else None
    row = row_at(target, reports) if reports else None
    failed = None if row else _reason(point)
    return Point(point.name, point.settings, row, failed, machine_at(reports) if reports else "")


def _commit(point: Point) -> str | None:
    """Of the experiment of that name which began at what HEAD holds."""
    return next((commit for commit, start in _experiments(point.name) if state(start) == state("HEAD")), None)


def _experiments(name: str) -> list[tuple[str, str]]:
    """Commits of the experiments of that name, or pattern, and the commits that each began at."""
    lines = (git("for-each-ref", "--format=%(objectname) %(refname)", f"refs/exps/*/*/{name}") or "").splitlines()
    found = (line.split(" ", 1) for line in lines)
    return [(commit, "".join(reference.split("/")[2:4])) for commit, reference in found]


def state(commit: str) -> str:
    """Of all files but the sweep's own reports, which one may commit without that its points are measured again."""
    return _state_of((git("rev-parse", commit) or commit).strip())


@cache
def _state_of(commit: str) -> str:
    lines = (git("ls-tree", "-r", commit) or "").splitlines()
    kept = [line for line in lines if Path(line.partition("\t")[2]) not in OUTPUTS]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


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
