"""Whether the required targets can be defended: their gates, their files, and what they lost since another revision.

A missing, unreadable or contradictory result is a miss: nothing passes because there is nothing to see.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite, nan
from pathlib import Path
from typing import Any, TypeVar

import yaml

from clip_deploy.core.artifact import MANIFEST, TOWERS
from clip_deploy.core.config import REFERENCE, CiConfig, GatesConfig
from clip_deploy.core.environment import Environment
from clip_deploy.core.errors import ConfigError, DeployError
from clip_deploy.core.json_files import read_json
from clip_deploy.core.manifest import Manifest, verify
from clip_deploy.core.parsing import AGAIN, parse, plain
from clip_deploy.core.recommendation import Recommendation
from clip_deploy.core.records import Benchmark, Measured, Metrics, Timing, Validation, ZeroShot
from clip_deploy.evaluate.gates import GateFailure, failures_now
from clip_deploy.report.decisive import JudgedTimings, Timings, again, judged
from clip_deploy.report.decisive import undecided as undecided_of
from clip_deploy.report.revisions import commit_of, committed
from clip_deploy.report.tables import number, table
from clip_deploy.report.why import changed

MEANT = "--allow-uncompared lets it pass"
PACKAGE = "package"
SHOWN = 3  # targets that are named of many with the same miss
DATA = (
    "data/calibration",
    "data/evaluation",
    "data/portable",
)  # what builds, checks and the package rest on
Found = dict[str, list[GateFailure]]  # by target
T = TypeVar("T")


@dataclass(frozen=True)
class Reports:
    """The files of reports/, as they are now or as a git commit holds them.

    Attributes:
        content: from a path below reports/ to what the JSON file holds, None where there is none.
        named: how a message names a file.
        way_out: what to do where one is of another version.
    """

    content: Callable[[str], Any]
    named: str = "reports/{}"
    way_out: str = AGAIN

    def read(self, kind: type[T], name: str, null_is_nan: bool = True) -> T | None:
        """A file as a `kind`, None where there is none; ConfigError where it is of another version."""
        content = self.content(name)
        where = self.named.format(name)
        return None if content is None else parse(kind, content, where, self.way_out, null_is_nan)

    def metrics(self) -> dict[str, Metrics]:
        return self.read(dict[str, Metrics], "targets.json", null_is_nan=False) or {}

    def environment(self) -> Environment | None:
        return self.read(Environment, "environment.json", null_is_nan=False)

    def advice(self) -> Recommendation | None:
        return self.read(Recommendation, "recommendation.json", null_is_nan=False)


@dataclass(frozen=True)
class Result:
    """What validate and benchmark left of a target; None where they left nothing."""

    checked: Validation | None
    timed: Benchmark | None

    @property
    def measured(self) -> Measured | None:
        return self.checked.measured if self.checked else None

    @property
    def threads(self) -> int | None:
        return self.timed.threads if self.timed else None

    @property
    def on_gpu(self) -> bool:
        return self.checked is not None and self.checked.device == "cuda"

    @property
    def timings(self) -> Timings:
        return self.timed.towers if self.timed else {}

    @property
    def size_mb(self) -> float | None:
        return self.checked.size_mb if self.checked else None

    @property
    def evaluation(self) -> str | None:
        """Which images and texts, as a hash."""
        return self.measured.evaluation if self.measured else None


def in_folder(folder: Path) -> Reports:
    """The reports of a folder, as they are now."""
    return Reports(lambda name: read_json(folder / name) if (folder / name).exists() else None, f"{folder}/{{}}")


def at_revision(revision: str, folder: Path) -> Reports:
    """The reports as a revision or a DVC experiment holds them; DeployError where there is none of that name."""
    commit = commit_of(revision)

    def read(name: str) -> Any:
        text = committed(folder / name, commit)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise DeployError(f"{folder / name} is not JSON at {revision} ({error}): name another revision") from error

    return Reports(read, f"{folder}/{{}} at {revision}", "name another revision")


def read_result(target: str, reports: Reports) -> Result:
    """What reports have of a target. Raises ConfigError where a file is of another version."""
    return Result(
        reports.read(Validation, f"validate/{target}.json"), reports.read(Benchmark, f"benchmark/{target}.json")
    )


@dataclass(frozen=True)
class Asked:
    """What a gate asks of targets, as files say it: `ci` and `gates` of params.yaml, and the limits that those name."""

    params: dict[str, Any]
    limits: dict[str, Any]


def asked(read: Callable[[Path], str | None], params: Path, conf: Path) -> Asked:
    """`read` gives a file's text, None where there is none. What is no YAML asks nothing."""
    settings = _settings(read(params))
    name = settings.get("gates")
    limits = _settings(read(conf / "gates" / f"{name}.yaml")) if isinstance(name, str) else {}
    return Asked({key: settings[key] for key in ("ci", "gates") if key in settings}, limits)


def _settings(text: str | None) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text or "")
    except yaml.YAMLError:
        found = None
    return found if isinstance(found, dict) else {}


def asked_otherwise(now: Asked, then: Asked) -> list[str]:
    """What a gate asked otherwise at another revision, which hides what was lost: a line for each setting."""
    lines = changed(then.params, now.params, "params.yaml") if then.params else ()
    return [*lines, *(changed(then.limits, now.limits, "conf/gates") if then.limits else ())]


def strictest(limits: CiConfig, then: Asked) -> CiConfig:
    """Of each limit on what may be lost the smaller, that of now or of then: a branch may have loosened its own."""
    former = then.params.get("ci")
    known = former if isinstance(former, dict) else {}
    names = [name for name in vars(limits) if name.startswith("max_") and type(known.get(name)) in (int, float)]
    return replace(limits, **{name: min(float(known[name]), getattr(limits, name)) for name in names})


def check_required(names: list[str], targets: list[str]) -> None:
    """Raises ConfigError where a name is none of the table's rows, or there is no name at all."""
    if not names:
        raise ConfigError(f"ci.required is empty, so nothing would be checked: name some of {', '.join(targets)}")
    if unknown := [name for name in names if name not in targets]:
        raise ConfigError(
            f"ci.required lists {unknown[0]!r}, which is not among targets: {', '.join(targets)}; take it out of "
            "ci.required, or put it into targets and `dvc repro`"
        )


def check_reports(names: list[str], reports: Reports, gates: GatesConfig, built: Path) -> Found:
    """All misses of the required targets, of what was packaged (under "package"), and of what they were judged on."""
    found = {name: check_target(name, reports, gates, built) for name in names}
    data = {name: check_data(built / name) for name in DATA}
    return {**found, PACKAGE: check_package_of(reports, built / PACKAGE), **data}


def check_target(target: str, reports: Reports, gates: GatesConfig, built: Path) -> list[GateFailure]:
    """All misses of one required target: its gate, its timings, its files in `built`, and the report on it."""
    result = read_result(target, reports)
    if result.checked is None:
        return [GateFailure("validation", "no result", AGAIN)]
    return [
        *failures_now(result.checked, gates),
        *_timing(result.timed),
        *_files(result.checked.files, built / target),
        *_reported(target, result.checked, reports),
    ]


def _timing(timed: Benchmark | None) -> list[GateFailure]:
    if timed is None:
        return [GateFailure("timing", "no result", AGAIN)]
    if timed.status != "measured":
        return [GateFailure("timing", timed.status, timed.reason or "")]
    missing = [GateFailure(f"{tower}: timing", "no result", AGAIN) for tower in TOWERS if not timed.towers.get(tower)]
    broken = [where for where, timing in each_timing(timed.towers) if not isfinite(timing.speedup)]
    return missing + [GateFailure(f"{where}: speed-up", "not a number", AGAIN) for where in broken]


def each_timing(timings: Mapping[str, Mapping[int, Any]]) -> Iterator[tuple[str, Any]]:
    """Each tower and batch size, as "vision, batch 8", with its timing."""
    for tower, sizes in timings.items():
        for batch, timing in sizes.items():
            yield f"{tower}, batch {batch}", timing


def _files(judged: dict[str, str], folder: Path) -> list[GateFailure]:
    """Whether the target's files are those that were judged, and no other lies among them."""
    try:
        manifest, found = verify(folder)
    except DeployError as error:
        return [GateFailure("files", str(error))]
    if not judged or any(sha != _sha(manifest, name) for name, sha in judged.items()):
        found = [*found, "not those that were judged"]
    return [GateFailure("files", difference, AGAIN) for difference in found]


def _reported(target: str, checked: Validation, reports: Reports) -> list[GateFailure]:
    """Whether the report and the recommendation are of these results."""
    status, advice = reports.metrics().get(target, {}).get("status"), reports.advice()
    advised = advice.targets.get(target) if advice else None
    found = [] if status == checked.status else [GateFailure("targets.json", f"says {status}", AGAIN)]
    same = advised is not None and advised.files == checked.files
    return found if same else [*found, GateFailure("recommendation.json", "is of other files", AGAIN)]


def check_data(folder: Path) -> list[GateFailure]:
    """Whether prepared data are as `prepare` wrote them."""
    try:
        _, found = verify(folder)
    except DeployError as error:
        found = [str(error)]
    return [GateFailure("files", difference, "run `dvc repro -f prepare`") for difference in found]


def check_package_of(reports: Reports, folder: Path) -> list[GateFailure]:
    """Whether all that was packaged passed its gate, byte for byte; nothing packaged is in order."""
    try:
        manifest, found = verify(folder)
    except DeployError as error:
        return [GateFailure("files", str(error))]
    named: set[str] = set()
    for tower, entry in sorted(manifest.towers.items()):
        target, files = entry.target, entry.files
        named |= {f"{target}/{MANIFEST}", *files}
        checked = reports.read(Validation, f"validate/{target}.json")
        judged = {f"{target}/{name}": sha for name, sha in checked.files.items()} if checked else {}
        same = files and all(name in judged and judged[name] == _sha(manifest, name) for name in files)
        if checked is None or checked.status != "pass" or not same:
            found = [*found, f"{tower}: {target} did not pass as it is packaged"]
    strange = [name for name in manifest.files if "/" in name and name not in named]
    found = [*found, *(f"{name}: of no tower, and so not judged" for name in strange)]
    return [GateFailure("files", difference, AGAIN) for difference in found]


def _sha(manifest: Manifest, name: str) -> str | None:
    """What a manifest says of a file."""
    return str(manifest.files[name]["sha256"]) if name in manifest.files else None


def undecided(names: list[str], reports: Reports) -> dict[str, list[str]]:
    """By target, which of its timings decide nothing, as "vision, batch 8", and so can neither be lost nor kept."""
    timings = judged_timings(names, reports)
    found = {name: list(undecided_of(timings[name])) for name in names}
    return {name: where for name, where in found.items() if where}


def judged_timings(names: list[str], reports: Reports) -> dict[str, JudgedTimings]:
    """The timings of these targets and of all others in the report, which says which of them ran on a busy machine."""
    known = dict.fromkeys([REFERENCE, *reports.metrics(), *names])
    results = {name: read_result(name, reports) for name in known}
    on_gpu = {name for name, result in results.items() if result.on_gpu}
    return judged({name: result.timings for name, result in results.items()}, on_gpu)


def compare_revisions(names: list[str], reports: Reports, former: Reports, limits: CiConfig) -> tuple[Found, Found]:
    """What required targets lost since `former`, and what could not be compared.

    Raises DeployError where nothing could be.
    """
    pairs = {name: (read_result(name, reports), read_result(name, former)) for name in names}
    known = [name for name, (_, before) in pairs.items() if before.measured]
    if not known:
        raise DeployError("that revision has no result of any required target: name one in which `dvc repro` was run")
    unlike = list(changed(hardware_of(former), hardware_of(reports), "reports/environment.json"))
    uncompared = {
        "machine": [GateFailure("timings", f"not compared, another machine: {line}", MEANT) for line in unlike]
    }
    spoiled, spoiled_before = undecided(known, reports), {} if unlike else undecided(known, former)
    lost: Found = {}
    for name, (now, before) in pairs.items():
        if name not in known:
            uncompared[name] = [GateFailure("all", "not compared: that revision has no result of it", MEANT)]
            continue
        left_out = {*spoiled.get(name, []), *spoiled_before.get(name, [])}
        lost[name] = [*_larger(now, before, limits), *_less_alike(now, before, limits)]
        lost[name] += _less_accurate(now, before, limits) + ([] if unlike else _slower(now, before, limits, left_out))
        uncompared[name] = [GateFailure(*said, MEANT) for said in _unlike(now, before, not unlike)]
        uncompared[name] += _undecided(name, spoiled, spoiled_before)
    return lost, uncompared


def other_weights(reports: Reports, former: Reports) -> list[str]:
    """Files of the checkpoint's weights that are not those of the former revision; none where either is unknown."""
    now, before = (read_result(REFERENCE, each).checked for each in (reports, former))
    if not now or not before or not now.files or not before.files:
        return []
    names = sorted(now.files.keys() | before.files.keys())  # the JSON beside them also changes with a library
    return [name for name in names if not name.endswith(".json") and now.files.get(name) != before.files.get(name)]


def _undecided(name: str, spoiled: dict[str, list[str]], before: dict[str, list[str]]) -> Iterator[GateFailure]:
    """The timings of a target that decide nothing, now or at the former revision."""
    if where := spoiled.get(name):
        yield GateFailure("timings", f"decide nothing: {'; '.join(where)}", f"{time_again(spoiled)}; {MEANT}")
    if where := before.get(name):
        way_out = "later revisions are held against the results that are committed now"
        yield GateFailure("timings", f"decided nothing at that revision: {'; '.join(where)}", f"{way_out}; {MEANT}")


def time_again(spoiled: dict[str, list[str]]) -> str:
    """The way out for targets whose timings decide nothing: one command for all of them."""
    return f"time again on a quiet machine: {again(spoiled)}"


def hardware_of(reports: Reports) -> dict[str, Any]:
    """The machine of a report as why.changed compares it; {"hardware": None} where it is unknown."""
    found = reports.environment()
    return {"hardware": plain(found.hardware) if found else None}


def _unlike(now: Result, before: Result, same_machine: bool) -> Iterator[tuple[str, str]]:
    """Quantities that cannot be compared, and why."""
    if now.evaluation != before.evaluation:
        yield "top-1", "not compared, its drop is: another evaluation set"
    if same_machine and before.threads != now.threads:
        yield "timings", f"not compared: threads were {before.threads}, and are {now.threads}"
    elif same_machine and (gone := dict(each_timing(before.timings)).keys() - dict(each_timing(now.timings)).keys()):
        yield "timings", f"not compared: not timed any more: {'; '.join(sorted(gone))}"


def _larger(now: Result, before: Result, limits: CiConfig) -> list[GateFailure]:
    size, former = (nan if (mb := result.size_mb) is None else mb for result in (now, before))
    if not isfinite(former) or size <= former * (1 + limits.max_size_growth / 100):
        return []
    limit = f"> {former:.2f} MB by more than {limits.max_size_growth:g} % (ci.max_size_growth)"
    return [GateFailure("size", f"{size:.2f} MB", limit)]


def _less_alike(now: Result, before: Result, limits: CiConfig) -> list[GateFailure]:
    found = []
    present = now.measured.parity if now.measured else {}
    for tower, parity in (before.measured.parity if before.measured else {}).items():
        cosine, former = present[tower].cosine_min if tower in present else nan, parity.cosine_min
        if not cosine >= former - limits.max_cosine_drop:
            limit = f"< {former:.6f} by more than {limits.max_cosine_drop:g} (ci.max_cosine_drop)"
            found.append(GateFailure(f"{tower}: cosine", f"{cosine:.6f}", limit))
    return found


def _less_accurate(now: Result, before: Result, limits: CiConfig) -> list[GateFailure]:
    """Top-1 itself on the same evaluation set; and its drop from torch-fp32 where its paired interval lies above it."""
    former = before.measured.zero_shot if before.measured else None
    if former is None or not before.checked or not before.checked.trained:
        return []
    present = now.measured.zero_shot if now.measured else None
    if present is None:
        return [GateFailure("top-1", "not measured", AGAIN)]
    found, more = [], f"by more than {limits.max_top1_drop:g} points (ci.max_top1_drop)"
    if now.evaluation == before.evaluation and not present.top1 >= former.top1 - limits.max_top1_drop:
        found.append(GateFailure("top-1", f"{present.top1:.2f} %", f"< {former.top1:.2f} % {more}"))
    if not present.top1_drop_low <= former.top1_drop_high + limits.max_top1_drop:
        found.append(GateFailure("top-1 drop", _drop(present), f"above {_drop(former)} {more}"))
    return found


def _slower(now: Result, before: Result, limits: CiConfig, left_out: set[str]) -> list[GateFailure]:
    """Speed-ups whose interval lies wholly below the former one by more than the limit; on a GPU p50s, and above it."""
    if now.threads != before.threads:
        return []
    share, present, found = limits.max_slow_down / 100, dict(each_timing(now.timings)), []
    for where, former in each_timing(before.timings):
        timing = present.get(where)
        if timing is None or where in left_out:
            continue
        if now.on_gpu:
            kept = timing.p50_low_ms <= former.p50_high_ms * (1 + share)
        else:
            kept = timing.speedup_high >= former.speedup_low * (1 - share)
        if not kept:
            name, show, side = (
                ("p50 ms", p50_interval, "above") if now.on_gpu else ("speed-up", speedup_interval, "below")
            )
            limit = f"{side} {show(former)} by more than {limits.max_slow_down:g} % (ci.max_slow_down)"
            found.append(GateFailure(f"{where}: {name}", show(timing), limit))
    return found


def p50_interval(timing: Timing) -> str:
    """The p50 in ms with its 95 % interval, for a message."""
    return f"{timing.p50_ms:.3g} [{timing.p50_low_ms:.3g}, {timing.p50_high_ms:.3g}]"


def speedup_interval(timing: Timing) -> str:
    """The speed-up over torch-fp32 with its 95 % interval, for a message."""
    return f"{timing.speedup:.2f} [{timing.speedup_low:.2f}, {timing.speedup_high:.2f}]"


def _drop(found: ZeroShot) -> str:
    return f"{found.top1_drop:.2f} [{found.top1_drop_low:.2f}, {found.top1_drop_high:.2f}]"


def verdicts(names: list[str], reports: Reports) -> str:
    """The required targets that all passed, as a Markdown table."""
    head = ["Target", "Gate", "Lowest cosine", "Top-1 drop, points", "Flips %", "Image speed-up", "Text speed-up"]
    timings = judged_timings(names, reports)
    return "\n".join(table(head, [_verdict(name, read_result(name, reports), timings[name]) for name in names]))


def _verdict(target: str, result: Result, timings: JudgedTimings) -> list[str]:
    checked, found = result.checked, result.measured
    assert checked is not None  # judge has seen to it
    assert found is not None
    speeds = [next(iter(timings[tower].values())) for tower in TOWERS]
    return [
        f"`{target}`",
        checked.status,
        f"{min(parity.cosine_min for parity in found.parity.values()):.4f}",
        number(found.zero_shot.top1_drop if found.zero_shot else None),
        number(found.flips),
        *("undecided" if speed.unstable else speedup_interval(speed) for speed in speeds),
    ]


def refusals(found: list[Found]) -> str:
    """Every miss as a line of a Markdown table; one line where many targets have the same, as with other code."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for part in found:
        for name, misses_of in part.items():
            for miss in misses_of:
                alike.setdefault((miss.quantity, miss.value, miss.limit), []).append(f"`{name}`")
    body = []
    for said, names in alike.items():
        shown = [f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more"] if len(names) > SHOWN + 1 else names
        body += [[name, *said] for name in shown]
    return "\n".join(table(["Target", "Quantity", "Value", "Limit"], body))
