"""The points of a sweep as one table, and what each parameter does to them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.config import REFERENCE
from clip_deploy.report.ci_gate import Reports, read_result
from clip_deploy.report.decisive import judged
from clip_deploy.report.recommend import pareto
from clip_deploy.report.rows import Row, row_of
from clip_deploy.report.tables import MISSING, number, stated, table

DRAWS = 2000  # of the bootstrap
MEASURES: dict[str, Callable[[Row], float | None]] = {  # whose means the values of a parameter are compared by
    "image speed-up": lambda row: _speedup(row, "vision"),
    "text speed-up": lambda row: _speedup(row, "text"),
    "top-1 drop": lambda row: row.zero_shot.top1_drop if row.zero_shot else None,
    "size MB": lambda row: row.size_mb,
}


@dataclass(frozen=True)
class Point:
    """One setting of all parameters.

    Attributes:
        name: of its experiment.
        settings: value by parameter.
        row: what was found; None where it failed or did not run yet.
        failed: why it failed.
    """

    name: str
    settings: Mapping[str, Any]
    row: Row | None = None
    failed: str | None = None


def row_at(target: str, reports: Reports) -> Row | None:
    """A target's row from the reports of an experiment; None where it has none."""
    found, reference = read_result(target, reports), read_result(REFERENCE, reports)
    if found.checked is None or found.timed is None:
        return None
    on_gpu = {target} if found.on_gpu else set()
    timings = judged({REFERENCE: reference.timings, target: found.timings}, on_gpu)
    return row_of(target, found.checked, found.timed, timings[target])


def as_markdown(name: str, target: str, points: Sequence[Point]) -> str:
    """The whole report of a sweep."""
    done = [point for point in points if point.row]
    parts = [
        f"# Sweep {name}: {target}",
        f"{len(points)} points: {len(done)} measured, {sum(point.failed is not None for point in points)} failed. "
        f"`dvc exp apply EXPERIMENT` takes one's settings and results into the workspace.",
        "\n".join(_points(points)),
        "\\* No other point that passes is as good in each tower's time, accuracy and size. ~ A timing that decides "
        "nothing, since the machine was busy.",
    ]
    parts += [f"- `{point.name}` failed: {point.failed}" for point in points if point.failed]
    effects = _effects(done)
    if effects:
        parts += [
            "## What each value does",
            "The mean over all points with that value, with its 95 % interval by bootstrap over points; times as the "
            "geometric mean of speed-ups over torch-fp32.",
            "\n".join(effects),
        ]
    return "\n\n".join(parts) + "\n"


def _points(points: Sequence[Point]) -> list[str]:
    parameters = list(points[0].settings)
    front = best(points)
    head = ["Experiment", *map(_short, parameters), "Gate", "Image p50 ms", "Image speed-up", "Text p50 ms"]
    head += ["Text speed-up", "Top-1 %", "Drop, points", "Flips %", "Lowest cosine", "Size MB", "Memory MB"]
    body = []
    for point in points:
        values = [str(point.settings[each]) for each in parameters]
        mark = " *" if point.name in front else ""
        body.append([f"`{point.name}`{mark}", *values, *_cells(point)])
    return table(head, body, left=len(parameters) + 2)


def best(points: Sequence[Point]) -> set[str]:
    """Names of the points than which no other is as good in time, accuracy and size."""
    named = {id(point.row): point.name for point in points if point.row and _counts(point.row)}
    rows = [point.row for point in points if point.row and id(point.row) in named]
    return {named[id(row)] for row in pareto(rows, batch_of(rows))} if rows else set()


def _counts(row: Row) -> bool:
    return row.status == "pass" and all(row.timing(tower) and not row.is_undecided(tower) for tower in TOWERS)


def batch_of(rows: Sequence[Row]) -> int:
    """The smallest that all were timed at."""
    return min(set.intersection(*(set(row.timings[tower]) for row in rows for tower in TOWERS)))


def _cells(point: Point) -> list[str]:
    row = point.row
    if row is None:
        return ["failed" if point.failed else MISSING, *[MISSING] * 10]
    zero_shot, speeds = row.zero_shot, []
    for tower in TOWERS:
        timing = row.timing(tower)
        speeds += [stated(timing, "p50_ms"), f"{timing.speedup:.2f}x" if timing else MISSING]
    return [
        row.status,
        *speeds,
        number(zero_shot.top1 if zero_shot else None),
        number(zero_shot.top1_drop if zero_shot else None),
        number(row.flips),
        f"{min(row.cosine_min.values()):.4f}" if row.cosine_min else MISSING,
        number(row.size_mb),
        number(row.memory_mb),
    ]


def _short(parameter: str) -> str:
    """Of "quantize.ort-int8-static.calibration" the end, which is what differs."""
    return parameter.rpartition(":")[2].rpartition(".")[2]


def _effects(points: Sequence[Point]) -> list[str]:
    body = []
    for parameter in points[0].settings if points else ():
        values = list(dict.fromkeys(str(point.settings[parameter]) for point in points))  # which may be lists
        if len(values) < 2:
            continue
        for value in values:
            rows = [point.row for point in points if point.row and str(point.settings[parameter]) == value]
            cells = [
                effect([found for row in rows if (found := measure(row)) is not None], name.endswith("speed-up"))
                for name, measure in MEASURES.items()
            ]
            body.append([_short(parameter), value, str(len(rows)), *cells])
    return table(["Parameter", "Value", "Points", *MEASURES], body) if body else []


def _speedup(row: Row, tower: str) -> float | None:
    timing = row.timing(tower)
    return None if timing is None or timing.undecided else timing.speedup


def effect(values: Sequence[float], geometric: bool) -> str:
    """The mean with its 95 % interval; of one value there is none."""
    if not values:
        return MISSING
    found = np.log(values) if geometric else np.asarray(values, dtype=float)
    back = math.exp if geometric else float
    if len(found) == 1:
        return number(back(float(found[0])))
    draws = np.random.default_rng(0).choice(found, (DRAWS, len(found))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{number(back(float(found.mean())))} [{number(back(float(low)))}, {number(back(float(high)))}]"
