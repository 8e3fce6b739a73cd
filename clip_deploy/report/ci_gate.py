"""Whether the required targets can be defended: their gates, their files, and what they lost since another revision.

A missing, unreadable or contradictory result is a miss: nothing passes because there is nothing to see.
"""

import functools
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.config import REFERENCE, CiConfig, GatesConfig
from clip_deploy.core.errors import ConfigError, DeployError
from clip_deploy.core.json_files import read_json
from clip_deploy.core.manifest import verify
from clip_deploy.evaluate.gates import GateFailure, failures_now, numbers
from clip_deploy.report.decisive import Timings, again, judged
from clip_deploy.report.decisive import undecided as undecided_of
from clip_deploy.report.tables import number, table
from clip_deploy.report.why import changed

AGAIN = "run `dvc repro`"
MEANT = "--allow-uncompared lets it pass"
PACKAGE = "package"
DATA = (
    "data/calibration",
    "data/evaluation",
    "data/portable",
)  # what builds, checks and the package rest on
Reports = Callable[[str], Any]  # a path below reports/ -> what the JSON file holds, None where there is none
Found = dict[str, list[GateFailure]]  # by target
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Result:
    """What validate and benchmark left of a target; empty where they left nothing."""

    checked: dict[str, Any]
    timed: dict[str, Any]


def readable(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` raise DeployError where a report is JSON of another shape than the pipeline's."""

    @functools.wraps(function)
    def run(*given: P.args, **named: P.kwargs) -> R:
        try:
            return function(*given, **named)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DeployError(
                f"a report is not as this version writes it ({error!r}): run `dvc repro`, or name another revision"
            ) from error

    return run


def in_folder(folder: Path) -> Reports:
    return lambda name: read_json(folder / name) if (folder / name).exists() else None


def at_revision(revision: str, folder: Path) -> Reports:
    """The reports as a git commit holds them; DeployError where git knows no such revision."""
    commit = commit_of(revision)

    def read(name: str) -> Any:
        text = committed(folder / name, commit)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise DeployError(f"{folder / name} is no JSON at {revision} ({error}): name another revision") from error

    return read


def commit_of(revision: str) -> str:
    """Raises DeployError where git knows no such revision."""
    known = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if known is None:
        raise DeployError(
            f"git knows no revision {revision!r} here: give one, as HEAD~1, main or v1.0 (in a shallow clone, fetch it "
            "first)"
        )
    return known.strip()


def committed(path: Path, commit: str) -> str | None:
    """What a file held then; None where it was not there. The path is from here: git's own begin at its top folder."""
    return git("show", f"{commit}:./{path.as_posix()}")


def git(*words: str) -> str | None:
    """What git prints; None where it fails."""
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def read_result(target: str, reports: Reports) -> Result:
    checked, timed = (numbers(reports(f"{kind}/{target}.json") or {}) for kind in ("validate", "benchmark"))
    return Result(checked, timed)


def check_required(names: list[str], targets: list[str]) -> None:
    """Raises ConfigError where a name is none of the table's rows, or there is no name at all."""
    if not names:
        raise ConfigError(f"ci.required is empty, so nothing would be checked: name some of {', '.join(targets)}")
    if unknown := [name for name in names if name not in targets]:
        raise ConfigError(
            f"ci.required lists {unknown[0]!r}, which is not among targets: {', '.join(targets)}; take it out of "
            "ci.required, or put it into targets and `dvc repro`"
        )


@readable
def check_reports(names: list[str], reports: Reports, gates: GatesConfig, built: Path) -> Found:
    """All misses of the required targets, of what was packaged (under "package"), and of what they were judged on."""
    found = {name: check_target(name, reports, gates, built) for name in names}
    data = {name: check_data(built / name) for name in DATA}
    return {**found, PACKAGE: check_package_of(reports, built / PACKAGE), **data}


def check_target(target: str, reports: Reports, gates: GatesConfig, built: Path) -> list[GateFailure]:
    result = read_result(target, reports)
    if not result.checked:
        return [GateFailure("validation", "no result", AGAIN)]
    return [
        *failures_now(result.checked, gates),
        *_timing(result.timed),
        *_files(result.checked.get("files", {}), built / target),
        *_reported(target, result.checked, reports),
    ]


def _timing(timed: dict[str, Any]) -> list[GateFailure]:
    if not timed:
        return [GateFailure("timing", "no result", AGAIN)]
    if timed.get("status") != "measured":
        return [GateFailure("timing", str(timed.get("status")), str(timed.get("reason", "")))]
    missing = [
        GateFailure(f"{tower}: timing", "no result", AGAIN) for tower in TOWERS if not timed["towers"].get(tower)
    ]
    speeds = {where: timing["speedup"] for where, timing in _timings(timed)}
    broken = [where for where, speed in speeds.items() if not isfinite(speed)]
    return missing + [GateFailure(f"{where}: speed-up", "not a number", AGAIN) for where in broken]


def _timings(timed: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Each tower and batch size, as "vision, batch 8", with its timing."""
    for tower, sizes in timed.get("towers", {}).items():
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


def _reported(target: str, checked: dict[str, Any], reports: Reports) -> list[GateFailure]:
    """Whether the report and the recommendation are of these results."""
    status = (reports("metrics.json") or {}).get(target, {}).get("status")
    advised = (reports("recommendation.json") or {}).get("targets", {}).get(target, {})
    found = [] if status == checked.get("status") else [GateFailure("metrics.json", f"says {status}", AGAIN)]
    same = advised.get("files") == checked.get("files", {})
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
    towers = manifest.get("towers", {})
    for tower in sorted({name.split(".")[0] for name in manifest.get("files", {}) if ".onnx" in name} | set(towers)):
        target = towers.get(tower, {}).get("target", "no target")
        checked = reports(f"validate/{target}.json") or {}
        graphs = [name for name in manifest.get("files", {}) if name.startswith(f"{tower}.onnx")]
        same = graphs and all(checked.get("files", {}).get(name) == _sha(manifest, name) for name in graphs)
        if checked.get("status") != "pass" or not same:
            found = [*found, f"{tower}: {target} did not pass as it is packaged"]
    return [GateFailure("files", difference, AGAIN) for difference in found]


def _sha(manifest: dict[str, Any], name: str) -> str | None:
    """What a manifest says of a file."""
    return manifest.get("files", {}).get(name, {}).get("sha256")


@readable
def undecided(names: list[str], reports: Reports) -> dict[str, list[str]]:
    """By target, which of its timings decide nothing, as "vision, batch 8", and so can neither be lost nor kept."""
    timings = _checked(names, reports)
    found = {name: list(undecided_of(timings[name])) for name in names}
    return {name: where for name, where in found.items() if where}


def _checked(names: list[str], reports: Reports) -> dict[str, Timings]:
    """The timings of these targets and of all others in the report, which says which of them ran on a busy machine."""
    known = dict.fromkeys([REFERENCE, *(reports("metrics.json") or {}), *names])
    results = {name: read_result(name, reports) for name in known}
    on_gpu = {name for name, result in results.items() if result.checked.get("device") == "cuda"}
    return judged({name: result.timed.get("towers", {}) for name, result in results.items()}, on_gpu)


@readable
def compare_revisions(names: list[str], reports: Reports, former: Reports, limits: CiConfig) -> tuple[Found, Found]:
    """What required targets lost since `former`, and what could not be compared.

    Raises DeployError where nothing could be.
    """
    pairs = {name: (read_result(name, reports), read_result(name, former)) for name in names}
    known = [name for name, (_, before) in pairs.items() if before.checked.get("parity")]
    if not known:
        raise DeployError("that revision has no result of any required target: name one in which `dvc repro` was run")
    unlike = list(changed(_hardware(former), _hardware(reports), "reports/environment.json"))
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


def _undecided(name: str, spoiled: dict[str, list[str]], before: dict[str, list[str]]) -> Iterator[GateFailure]:
    """The timings of a target that decide nothing, now or at the former revision."""
    if where := spoiled.get(name):
        yield GateFailure("timings", f"decide nothing: {'; '.join(where)}", f"{time_again(spoiled)}; {MEANT}")
    if where := before.get(name):
        way_out = "later revisions are held against the results that are committed now"
        yield GateFailure("timings", f"decided nothing at that revision: {'; '.join(where)}", f"{way_out}; {MEANT}")


def time_again(spoiled: dict[str, list[str]]) -> str:
    return f"time again on a quiet machine: {again(spoiled)}"


def _hardware(reports: Reports) -> dict[str, Any]:
    return {"hardware": (reports("environment.json") or {}).get("hardware")}


def _unlike(now: Result, before: Result, same_machine: bool) -> Iterator[tuple[str, str]]:
    """Quantities that cannot be compared, and why."""
    if now.checked.get("evaluation") != before.checked.get("evaluation"):
        yield "top-1", "not compared, its drop is: another evaluation set"
    threads = [result.timed.get("threads") for result in (before, now)]
    if same_machine and threads[0] != threads[1]:
        yield "timings", f"not compared: threads were {threads[0]}, and are {threads[1]}"
    elif same_machine and (gone := dict(_timings(before.timed)).keys() - dict(_timings(now.timed)).keys()):
        yield "timings", f"not compared: not timed any more: {'; '.join(sorted(gone))}"


def _larger(now: Result, before: Result, limits: CiConfig) -> list[GateFailure]:
    size, former = now.checked.get("size_mb", nan), before.checked.get("size_mb", nan)
    if not isfinite(former) or size <= former * (1 + limits.max_size_growth / 100):
        return []
    limit = f"> {former:.2f} MB by more than {limits.max_size_growth:g} % (ci.max_size_growth)"
    return [GateFailure("size", f"{size:.2f} MB", limit)]


def _less_alike(now: Result, before: Result, limits: CiConfig) -> list[GateFailure]:
    found = []
    for tower, parity in before.checked["parity"].items():
        cosine, former = now.checked.get("parity", {}).get(tower, {}).get("cosine_min", nan), parity["cosine_min"]
        if not cosine >= former - limits.max_cosine_drop:
            limit = f"< {former:.6f} by more than {limits.max_cosine_drop:g} (ci.max_cosine_drop)"
            found.append(GateFailure(f"{tower}: cosine", f"{cosine:.6f}", limit))
    return found


def _less_accurate(now: Result, before: Result, limits: CiConfig) -> list[GateFailure]:
    """Top-1 itself on the same evaluation set; and its drop from torch-fp32, by the paired intervals."""
    former = before.checked.get("zero_shot")
    if not former or not before.checked.get("trained"):
        return []
    present = {**dict.fromkeys(former, nan), **now.checked.get("zero_shot", {})}
    found = []
    same_set = now.checked.get("evaluation") == before.checked.get("evaluation")
    if same_set and not present["top1"] >= former["top1"] - limits.max_top1_drop:
        limit = f"< {former['top1']:.2f} % by more than {limits.max_top1_drop:g} points (ci.max_top1_drop)"
        found.append(GateFailure("top-1", f"{present['top1']:.2f} %", limit))
    if not present["top1_drop_low"] <= former["top1_drop_high"]:
        found.append(
            GateFailure("top-1 drop", _interval(present, "top1_drop"), f"above {_interval(former, 'top1_drop')}")
        )
    return found


def _slower(now: Result, before: Result, limits: CiConfig, left_out: set[str]) -> list[GateFailure]:
    """Speed-ups whose interval lies wholly below the former one by more than the limit; on a GPU p50s, and above it."""
    if now.timed.get("threads") != before.timed.get("threads"):
        return []
    share, on_gpu = limits.max_slow_down / 100, now.checked.get("device") == "cuda"
    present, found = dict(_timings(now.timed)), []
    for where, former in _timings(before.timed):
        timing = present.get(where)
        if timing is None or where in left_out:
            continue
        if on_gpu:
            kept = timing["p50_low_ms"] <= former["p50_high_ms"] * (1 + share)
        else:
            kept = timing["speedup_high"] >= former["speedup_low"] * (1 - share)
        if not kept:
            name, show, side = ("p50 ms", _p50, "above") if on_gpu else ("speed-up", _speedup, "below")
            limit = f"{side} {show(former)} by more than {limits.max_slow_down:g} % (ci.max_slow_down)"
            found.append(GateFailure(f"{where}: {name}", show(timing), limit))
    return found


def _p50(timing: dict[str, float]) -> str:
    return f"{timing['p50_ms']:.3g} [{timing['p50_low_ms']:.3g}, {timing['p50_high_ms']:.3g}]"


def _speedup(timing: dict[str, float]) -> str:
    return _interval(timing, "speedup")


def _interval(record: dict[str, float], key: str) -> str:
    return f"{record[key]:.2f} [{record[f'{key}_low']:.2f}, {record[f'{key}_high']:.2f}]"


def verdicts(names: list[str], reports: Reports) -> str:
    """The required targets that all passed, as a Markdown table."""
    head = ["Target", "Gate", "Lowest cosine", "Top-1 drop, points", "Flips %", "Image speed-up", "Text speed-up"]
    timings = _checked(names, reports)
    return "\n".join(table(head, [_verdict(name, read_result(name, reports), timings[name]) for name in names]))


def _verdict(target: str, result: Result, timings: Timings) -> list[str]:
    checked = result.checked
    lowest = min(parity["cosine_min"] for parity in checked["parity"].values())
    drop = checked.get("zero_shot", {}).get("top1_drop")
    speeds = [next(iter(timings[tower].values())) for tower in TOWERS]
    return [
        f"`{target}`",
        checked["status"],
        f"{lowest:.4f}",
        number(drop),
        number(checked["flips"]),
        *("undecided" if speed["unstable"] else _interval(speed, "speedup") for speed in speeds),
    ]


def refusals(found: list[Found]) -> str:
    """Every miss as a line of a Markdown table."""
    missed = [(name, miss) for part in found for name, misses_of in part.items() for miss in misses_of]
    body = [[f"`{name}`", miss.quantity, miss.value, miss.limit] for name, miss in missed]
    return "\n".join(table(["Target", "Quantity", "Value", "Limit"], body))
