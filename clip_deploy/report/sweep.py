"""The points of a sweep as tables and plots, and what each parameter does to them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.config import REFERENCE
from clip_deploy.report import markdown, page
from clip_deploy.report.ci_gate import Reports, read_result
from clip_deploy.report.contents import Block, Section, Table
from clip_deploy.report.decisive import judged
from clip_deploy.report.figures import Axis, accuracy_figure, parallel_figure
from clip_deploy.report.recommend import SAME_COSINE, SAME_SIZE, pareto
from clip_deploy.report.rows import Row, row_of
from clip_deploy.report.tables import MISSING, number, speedup_cell, stated

DRAWS = 2000  # of the bootstrap
DECIMALS = 4  # of an effect
MOST_VALUES = 8  # of a parameter, whose effects are stated
COSTS: dict[str, Callable[[Row], float | None]] = {  # of a point; all are to be small
    "vision_p50_ms": lambda row: _p50(row, "vision"),
    "text_p50_ms": lambda row: _p50(row, "text"),
    "top1_drop": lambda row: row.zero_shot.top1_drop if row.zero_shot else None,
    "cosine_loss": lambda row: 1 - min(row.cosine_min.values()) if row.cosine_min else None,
    "size_mb": lambda row: row.size_mb,
    "memory_mb": lambda row: row.memory_mb,
}
MEASURES: dict[str, Callable[[Row], float | None]] = {  # whose means the values of a parameter are compared by
    "image speed-up": lambda row: _steady_speedup(row, "vision"),
    "text speed-up": lambda row: _steady_speedup(row, "text"),
    "top-1 drop": COSTS["top1_drop"],
    "size MB": COSTS["size_mb"],
}
DRAWN = {  # uprights of the plot, behind those of the parameters
    "image ms": "vision_p50_ms",
    "text ms": "text_p50_ms",
    "top-1 drop": "top1_drop",
    "size MB": "size_mb",
    "memory MB": "memory_mb",
}


@dataclass(frozen=True)
class Point:
    """One setting of all parameters.

    Attributes:
        name: of its experiment.
        settings: value by parameter.
        row: what was found; None where it failed or did not run yet.
        failed: why it failed.
        machine: what timed it.
    """

    name: str
    settings: Mapping[str, Any]
    row: Row | None = None
    failed: str | None = None
    machine: str = ""


def machine_at(reports: Reports) -> str:
    """The hardware of an experiment, in words."""
    environment = reports.environment()
    if environment is None:
        return ""
    found = environment.hardware
    parts = [found.machine, *found.gpus, found.cpu, f"{found.cores} cores"]
    return ", ".join(part for part in parts if part)


def row_at(target: str, reports: Reports) -> Row | None:
    """A target's row from the reports of an experiment; None where it has none."""
    found, reference = read_result(target, reports), read_result(REFERENCE, reports)
    if found.checked is None or found.timed is None:
        return None
    on_gpu = {target} if found.on_gpu else set()
    timings = judged({REFERENCE: reference.timings, target: found.timings}, on_gpu)
    return row_of(target, found.checked, found.timed, timings[target])


def as_markdown(name: str, target: str, points: Sequence[Point]) -> str:
    """The whole report of a sweep, without its plots."""
    return markdown.as_markdown(_title(name, target), [], sections(points))


def as_page(name: str, target: str, points: Sequence[Point]) -> str:
    """The whole report as one HTML page."""
    rows = [replace(point.row, target=point.name) for point in points if point.row]
    return page.as_page(_title(name, target), [], sections(points), rows)


def shown(name: str, target: str, points: Sequence[Point]) -> str:
    """What a terminal shows: the points alone, in the columns that tell most."""
    points_alone = Section("Points", [_counted(points), _points(points, TOLD)])
    return markdown.as_markdown(_title(name, target), [], [points_alone])


def _title(name: str, target: str) -> str:
    return f"Sweep {name}: {target}"


def sections(points: Sequence[Point]) -> list[Section]:
    """Points of several machines stand in one table, and are compared among those of their own machine alone."""
    found = [Section("Points", [_counted(points), _points(points, list(CELLS)), NOTE, *_reasons(points)])]
    machines = _machines(points)
    for machine in machines:
        done = [point for point in points if point.row and point.machine == machine]
        found += _compared(done, f": {machine}" if len(machines) > 1 else "")
    return found


def _machines(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.machine for point in points if point.row))


def _compared(points: Sequence[Point], where: str) -> list[Section]:
    """Of one machine's points."""
    front, found = best(points), []
    if len(points) > 1:
        named = [replace(point.row, target=point.name) for point in points if point.row]
        plots = [accuracy_figure(named, front), parallel_figure(_axes(points), *_lines(points, front))]
        found.append(Section(f"Plots{where}", [PLOTTED, *(plot for plot in plots if plot)]))
    if front:
        lines = [f"- `dvc exp apply {point.name}`: {_settings(point)}" for point in points if point.name in front]
        found.append(Section(f"The front{where}", ["\n".join(lines)]))
    if effects := _effects(points):
        found.append(Section(f"What each value does{where}", [MEANS, effects]))
    return found


NOTE = (
    "Times and speed-ups over torch-fp32 are of a call at the smallest batch size. "
    "\\* On the Pareto front: no other point that passes is as good in each tower's time, lowest cosine, top-1 drop "
    "and size, and better in one. Times and drops are alike where their intervals overlap, cosines within "
    f"{SAME_COSINE:.4f}, sizes within {100 * (SAME_SIZE - 1):.0f} %. "
    "~ A timing that decides nothing, since the machine was busy."
)
PLOTTED = "In the second plot a line is a point, and each upright runs from the lowest value to the highest."
MEANS = (
    "The mean over all points with that value, with its 95 % interval by bootstrap over points; times as the "
    "geometric mean of speed-ups over torch-fp32. Where a search chose the points, they are not balanced: what a value "
    "seems to do may be another setting's doing."
)


def _counted(points: Sequence[Point]) -> str:
    done, failed = sum(point.row is not None for point in points), sum(point.failed is not None for point in points)
    return (
        f"{len(points)} points: {done} measured, {failed} failed. `dvc exp apply EXPERIMENT` takes one's settings and "
        "results into the workspace."
    )


def _reasons(points: Sequence[Point]) -> list[Block]:
    failed = [f"- `{point.name}` failed: {point.failed}" for point in points if point.failed]
    return ["\n".join(failed)] if failed else []


def _settings(point: Point) -> str:
    titles = _titles(list(point.settings))
    return ", ".join(f"{titles[key]} {value}" for key, value in point.settings.items())


def _points(points: Sequence[Point], columns: Sequence[str]) -> Table:
    parameters, machines, body = list(points[0].settings), _machines(points), []
    front = {name for machine in machines for name in best([each for each in points if each.machine == machine])}
    for point in points:
        mark = " *" if point.name in front else ""
        settings = [str(point.settings[each]) for each in parameters]
        gate = point.row.status if point.row else "failed" if point.failed else MISSING
        cells = [CELLS[column](point.row) if point.row else MISSING for column in columns]
        where = [point.machine or MISSING] if len(machines) > 1 else []
        body.append([f"`{point.name}`{mark}", *settings, *where, gate, *cells])
    machine = ["Machine"] if len(machines) > 1 else []
    head = ["Experiment", *_titles(parameters).values(), *machine, "Gate", *columns]
    return Table(head, body, left=len(head) - len(columns))


CELLS: dict[str, Callable[[Row], str]] = {  # columns behind the settings
    "Image p50 ms": lambda row: stated(row.timing("vision"), "p50_ms"),
    "Image speed-up [95 %]": lambda row: speedup_cell(row.timing("vision")),
    "Text p50 ms": lambda row: stated(row.timing("text"), "p50_ms"),
    "Text speed-up [95 %]": lambda row: speedup_cell(row.timing("text")),
    "Top-1 %": lambda row: number(row.zero_shot.top1 if row.zero_shot else None),
    "Drop, points": lambda row: number(row.zero_shot.top1_drop if row.zero_shot else None),
    "Flips %": lambda row: number(row.flips),
    "Lowest cosine": lambda row: f"{min(row.cosine_min.values()):.4f}" if row.cosine_min else MISSING,
    "Size MB": lambda row: number(row.size_mb),
    "Memory MB": lambda row: number(row.memory_mb),
}
TOLD = ("Image p50 ms", "Text p50 ms", "Drop, points", "Size MB")  # in a terminal


def _axes(points: Sequence[Point]) -> list[Axis]:
    """The parameters that differ, then what was measured."""
    found = []
    for key, title in _titles(list(points[0].settings)).items():
        values = [point.settings[key] for point in points]
        kinds = sorted({str(value) for value in values})
        if len(kinds) < 2:
            continue
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            found.append(Axis(title, [float(value) for value in values]))
        else:
            found.append(Axis(title, [float(kinds.index(str(value))) for value in values], kinds))
    for title, name in DRAWN.items():
        measured = [COSTS[name](point.row) if point.row else None for point in points]
        if any(value is not None for value in measured):
            found.append(Axis(title, measured))
    return found


def _lines(points: Sequence[Point], front: set[str]) -> tuple[list[str], list[str]]:
    """The points' names, and which kind of line each is drawn as."""
    fit = {True: "on the Pareto front", False: "passes its gate"}
    kinds = [
        fit[point.name in front] if point.row and point.row.status == "pass" else "misses its gate" for point in points
    ]
    return [point.name for point in points], kinds


def best(points: Sequence[Point]) -> set[str]:
    """Names of the points that no other beats."""
    named = {id(point.row): point.name for point in points if point.row and _counts(point.row)}
    rows = [point.row for point in points if point.row and id(point.row) in named]
    return {named[id(row)] for row in pareto(rows, batch_of(rows))} if rows else set()


def _counts(row: Row) -> bool:
    return row.status == "pass" and all(row.timing(tower) and not row.is_undecided(tower) for tower in TOWERS)


def batch_of(rows: Sequence[Row]) -> int:
    """The smallest that all were timed at."""
    return min(set.intersection(*(set(row.timings[tower]) for row in rows for tower in TOWERS)))


def _titles(parameters: Sequence[str]) -> dict[str, str]:
    """Of "quantize.ort-int8-static.calibration" the end, which is what differs; the whole where two ends are alike."""
    ends = {each: each.rpartition(":")[2].rpartition(".")[2] for each in parameters}
    return {each: end if list(ends.values()).count(end) == 1 else each for each, end in ends.items()}


def _effects(points: Sequence[Point]) -> Table | None:
    """Of parameters whose values come again, as those of a range hardly do."""
    body = []
    for parameter, title in _titles(list(points[0].settings) if points else []).items():
        values = list(dict.fromkeys(str(point.settings[parameter]) for point in points))  # which may be lists
        if not 1 < len(values) <= MOST_VALUES:
            continue
        for value in values:
            rows = [point.row for point in points if point.row and str(point.settings[parameter]) == value]
            cells = [
                effect([found for row in rows if (found := measure(row)) is not None], name.endswith("speed-up"))
                for name, measure in MEASURES.items()
            ]
            body.append([title, value, str(len(rows)), *cells])
    return Table(["Parameter", "Value", "Points", *MEASURES], body) if body else None


def _p50(row: Row, tower: str) -> float | None:
    timing = row.timing(tower)
    return timing.p50_ms if timing else None


def _steady_speedup(row: Row, tower: str) -> float | None:
    timing = row.timing(tower)
    return None if timing is None or timing.undecided else timing.speedup


def effect(values: Sequence[float], geometric: bool) -> str:
    """The mean with its 95 % interval; of one value there is none."""
    if not values:
        return MISSING
    found = np.log(values) if geometric else np.asarray(values, dtype=float)
    if len(found) == 1:
        return _stated(found[0], geometric)
    draws = np.random.default_rng(0).choice(found, (DRAWS, len(found))).mean(axis=1)
    mean, low, high = (_stated(value, geometric) for value in (found.mean(), *np.percentile(draws, [2.5, 97.5])))
    return f"{mean} [{low}, {high}]"


def _stated(value: float, is_log: bool) -> str:
    """What is nearly nothing is nothing: sums of numbers of both signs leave the last bits."""
    return number(round(math.exp(value) if is_log else float(value), DECIMALS) + 0.0)
