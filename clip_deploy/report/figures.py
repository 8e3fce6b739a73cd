"""The page's plots, in Vega-Lite (https://vega.github.io/vega-lite/docs/); page.py draws them as SVG.

Colours are the page's own, by the names in its style, so that plots turn dark with it. A plot is as wide as a phone's
screen, so that its words are read there.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.config import REFERENCE
from clip_deploy.core.records import Search
from clip_deploy.report.contents import Figure
from clip_deploy.report.decisive import Judged
from clip_deploy.report.labels import LETTER, LINE, place_labels, spread
from clip_deploy.report.rows import Row
from clip_deploy.report.tables import number

WIDTH, PLANE = 400, 340  # pixels, of a whole plot and of the plane of one that has no names beside it
NARROW = 100  # pixels of a plane beside names so long that the plot is wider than WIDTH
FAMILY = "Liberation Sans, Arial, Helvetica, sans-serif"
INK, DIM, FAINT = "var(--ink)", "var(--dim)", "var(--line)"
NAME: dict[str, Any] = {
    "type": "text",
    "align": "left",
    "baseline": "middle",
    "fontSize": 10,
    "color": INK,
    "aria": False,
}
NAME |= {"font": "Liberation Mono, DejaVu Sans Mono, Menlo, Consolas, monospace"}
KINDS = {"ships": ("var(--link)", "diamond"), "on the Pareto front": ("var(--good)", "triangle-up")}
KINDS |= {"passes its gate": ("var(--mark)", "circle"), "misses its gate": ("var(--bad)", "cross")}
HUES = [f"var(--hue-{index})" for index in range(8)]
DASHES = [[1, 0], [5, 3], [2, 2]]
TOWER_COLOURS = {"field": "tower", "scale": {"domain": list(TOWERS), "range": [HUES[0], HUES[1]]}}
RULE: dict[str, Any] = {"type": "rule", "strokeWidth": 1.5, "aria": False}
AXIS: dict[str, Any] = {
    "labelColor": DIM,
    "titleColor": DIM,
    "gridColor": FAINT,
    "domainColor": FAINT,
    "tickColor": FAINT,
}
AXIS |= {"titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 11, "labelFlush": False}
LEGEND = {"labelColor": DIM, "labelFontSize": 11, "title": None, "orient": "top"}
CONFIG = {"font": FAMILY, "view": {"stroke": None}, "axis": AXIS, "legend": LEGEND, "padding": 4}

Spec = dict[str, Any]
Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`; `ticks` where it has some of its own."""

    low: float
    high: float
    is_log: bool = False
    ticks: list[float] | None = None

    @classmethod
    def around(cls, values: Sequence[float], is_log: bool = False, least: float = 0.0, margin: float = 0.06) -> "Scale":
        """With a margin on both sides, as a share, and no shorter than `least`."""
        low, high = (math.log(value) if is_log else value for value in (min(values), max(values)))
        aside = max((high - low) * margin, (least - (high - low)) / 2, 0.0 if high > low else abs(high) * 0.05 or 0.05)
        low, high = low - aside, high + aside
        return cls(math.exp(low), math.exp(high), True) if is_log else cls(low, high)

    def share(self, value: float) -> float:
        """How far along the axis a value lies, from 0 to 1."""
        low, high, at = (math.log(end) if self.is_log else end for end in (self.low, self.high, value))
        return (at - low) / (high - low)

    def marks(self) -> list[float] | None:
        """Where an axis has its ticks: those of its own, round numbers of a logarithmic one, or what Vega finds."""
        if self.ticks or not self.is_log:
            return self.ticks
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            found = [digit * 10.0**power for power in powers for digit in digits]
            found = [mark for mark in found if self.low <= mark <= self.high]
            if len(found) >= 3:
                break
        return found


def accuracy_figure(rows: Sequence[Row], front: Collection[str], ship: Collection[str] = ()) -> Figure | None:
    """A dot for each target, its name beside it; `ship` holds those that ship."""
    judged = any(row.trained and row.zero_shot for row in rows)
    found = [(row, _decided(row, "vision", "p50_ms"), _accuracy(row, judged)) for row in rows]
    drawn = [(row, x, y) for row, x, y in found if x is not None and y is not None]
    if not drawn:
        return None
    quantity = "top-1 in %" if judged else "lowest cosine"
    across = Scale.around([x for _, x, _ in drawn], is_log=True, margin=0.1)
    up = Scale.around([y for _, _, y in drawn], least=2.0 if judged else 1e-4)
    height = max(240, 24 * len(drawn))
    values: list[dict[str, Any]] = [
        {"target": row.target, "kind": kind, "x": x, "y": y, "said": f"{_said(row, x, quantity, y)}, {kind}", **place}
        for (row, x, y), place in zip(drawn, _dot_places(drawn, across, up, height), strict=True)
        for kind in [_kind(row, front, ship)]
    ]
    place = {"x": _axis("x", across, f"vision p50 in ms, batch {_smallest(rows)}"), "y": _axis("y", up, quantity)}
    dots = {**place, **_kinds([value["kind"] for value in values]), "description": {"field": "said"}}
    layers: list[Spec] = [
        _leaders("dot_x", "dot_y", "near_x", "near_y"),
        {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1}, "encoding": dots},
        _names("name_x", "name_y"),
    ]
    caption = f"{quantity.capitalize()} against latency"
    return _figure(caption, values, layers, width=PLANE, height=height)


def _dot_places(
    drawn: list[tuple[Row, float, float]], across: Scale, up: Scale, height: float
) -> Iterator[dict[str, float]]:
    """For each dot: where it lies, where its name stands, and where the line between them ends; in pixels."""
    dots = [(PLANE * across.share(x), height * (1 - up.share(y))) for _, x, y in drawn]
    names = place_labels(dots, [row.target for row, _, _ in drawn], PLANE, height)
    for dot, name in zip(dots, names, strict=True):
        ends = {"dot_x": dot[0], "dot_y": dot[1], "near_x": name.near[0], "near_y": name.near[1]}
        yield {**ends, "name_x": name.x, "name_y": name.y}


def _kinds(found: Sequence[str]) -> Spec:
    """Colours and shapes of the kinds of dots that there are."""
    kinds = [kind for kind in KINDS if kind in found]
    colours, shapes = ([KINDS[kind][part] for kind in kinds] for part in (0, 1))
    return {
        "color": {"field": "kind", "scale": {"domain": kinds, "range": colours}},
        "shape": {"field": "kind", "scale": {"domain": kinds, "range": shapes}},
    }


def _kind(row: Row, front: Collection[str], ship: Collection[str]) -> str:
    if row.status != "pass":
        return "misses its gate"
    if row.target in ship:
        return "ships"
    return "on the Pareto front" if row.target in front else "passes its gate"


def _said(row: Row, p50_ms: float, quantity: str, accuracy: float) -> str:
    return f"{row.target}: {number(p50_ms)} ms, {quantity} {accuracy:.6g}"


def speed_figure(rows: Sequence[Row]) -> Figure | None:
    """What rows are compared by, with its interval: bars of speed-ups on a CPU; p50, as dots, on a GPU."""
    on_gpu = any(row.device == "cuda" and row.timings for row in rows)
    shown = [row for row in rows if row.timings and (row.device == "cuda") == on_gpu]
    keys = ("p50_ms", "p50_low_ms", "p50_high_ms") if on_gpu else ("speedup", "speedup_low", "speedup_high")
    timed = [(row, tower, row.timing(tower)) for row in shown for tower in TOWERS]
    values = [_measured(row, tower, timing, keys) for row, tower, timing in timed if timing]
    decided = [value for value in values if "middle" in value]
    if not decided:
        return None
    title = "p50 in ms" if on_gpu else f"speed-up over {REFERENCE}"
    ends = [value[end] for value in decided for end in ("low", "high")]
    scale = Scale.around(ends, is_log=True) if on_gpu else Scale(0, 1.05 * max(1.0, *ends))
    place = {"y": _target_axis(shown), "yOffset": {"field": "tower", "sort": list(TOWERS)}}
    undecided = {"mark": {**NAME, "dx": 3}, "encoding": {"x": {"value": 0}, "text": {"field": "undecided"}}}
    layers = [*(_intervals if on_gpu else _bars)(scale, title), undecided]
    for layer in layers:
        layer["encoding"] = {**place, **layer["encoding"]}
    even = {"mark": {**RULE, "color": DIM, "strokeDash": [3, 3]}, "encoding": {"x": {"datum": 1}}}
    marked = " (~: decides nothing)" if len(decided) < len(values) else ""
    caption = f"{title[0].upper()}{title[1:]}, batch {_smallest(rows)}, with 95 % intervals{marked}"
    width = max(NARROW, WIDTH - 30 - LETTER * max(len(row.target) for row in shown))
    return _figure(caption, values, [*layers, *([] if on_gpu else [even])], width=width, height={"step": 11})


def _bars(scale: Scale, title: str) -> list[Spec]:
    """From 0, with the interval at their ends."""
    value = {"x": _axis("middle", scale, title), "color": TOWER_COLOURS, "description": {"field": "said"}}
    interval = {"x": _axis("low", scale, title), "x2": {"field": "high"}}
    return [{"mark": {"type": "bar"}, "encoding": value}, {"mark": {**RULE, "color": INK}, "encoding": interval}]


def _intervals(scale: Scale, title: str) -> list[Spec]:
    """As lines, with a dot at the value: a logarithmic axis has no 0 for a bar to stand on."""
    interval = {"x": _axis("low", scale, title), "x2": {"field": "high"}, "color": TOWER_COLOURS}
    value = {"x": _axis("middle", scale, title), "color": TOWER_COLOURS, "description": {"field": "said"}}
    dot = {"type": "point", "filled": True, "size": 45, "opacity": 1}
    return [{"mark": RULE, "encoding": interval}, {"mark": dot, "encoding": value}]


def _measured(row: Row, tower: str, timing: Judged, keys: tuple[str, str, str]) -> dict[str, Any]:
    value = {"target": row.target, "tower": tower, "undecided": ""}
    if timing.undecided:
        return {**value, "undecided": "~", "said": f"{row.target} {tower} undecided"}
    middle, low, high = (getattr(timing, key) for key in keys)
    said = f"{row.target} {tower} {number(middle)} [{number(low)}, {number(high)}]"
    return {**value, "middle": middle, "low": low, "high": high, "said": said}


def throughput_figure(rows: Sequence[Row]) -> Figure | None:
    """Lines over batch sizes."""
    curves = {
        row.target: [
            (float(batch), timing.throughput_per_s)
            for batch, timing in sorted(row.timings.get("vision", {}).items())
            if not timing.undecided
        ]
        for row in rows
    }
    return _curves(curves, "Images/s over batch sizes", "batch size", "images/s", is_log=True)


@dataclass(frozen=True)
class Axis:
    """An upright of parallel_figure.

    Attributes:
        values: of each line; None where it has none.
        names: of the values 0, 1, ... of what has no number.
    """

    title: str
    values: Sequence[float | None]
    names: Sequence[str] = ()

    def marks(self) -> list[tuple[float, str]]:
        """Where the upright is lettered, and what stands there."""
        if self.names:
            return list(enumerate(self.names))
        found = sorted({value for value in self.values if value is not None})
        return [(value, number(value)) for value in dict.fromkeys((found[0], found[-1]))]

    def share(self, value: float) -> float:
        """How far up a value lies, from 0 to 1; of a single one half-way."""
        found = [each for each in self.values if each is not None]
        low, high = min(found), max(found)
        return (value - low) / (high - low) if high > low else 0.5


def parallel_figure(axes: Sequence[Axis], lines: Sequence[str], kinds: Sequence[str]) -> Figure:
    """Parallel coordinates: an upright for each axis, a line for each of `lines`, coloured by its kind (KINDS)."""
    order = sorted(range(len(lines)), key=lambda place: list(KINDS).index(kinds[place]), reverse=True)
    values: list[dict[str, Any]] = []
    for place in order:
        told = [(axis, axis.values[place]) for axis in axes]
        told_of = ", ".join(f"{axis.title} {_told(axis, value)}" for axis, value in told if value is not None)
        said = f"{lines[place]}: {told_of}"
        values += [
            {"line": lines[place], "kind": kinds[place], "axis": axis.title, "up": axis.share(value), "said": said}
            for axis, value in told
            if value is not None
        ]
    marks = [
        {"axis": axis.title, "up": axis.share(value), "said": text} for axis in axes for value, text in axis.marks()
    ]
    across = {
        "field": "axis",
        "type": "ordinal",
        "sort": None,
        "scale": {"domain": [axis.title for axis in axes]},
        "axis": {"title": None, "labelAngle": -35, "ticks": False, "grid": True, "domain": False, "labelLimit": 0},
    }
    up = {"field": "up", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1]}}
    colours = [kind for kind in KINDS if kind in kinds]
    colour = {
        "field": "kind",
        "scale": {"domain": colours, "range": [KINDS[kind][0] for kind in colours]},
        "legend": LEGEND | {"symbolType": "stroke", "symbolStrokeWidth": 2},
    }
    layers: list[Spec] = [
        {
            "mark": {"type": "line", "strokeWidth": 1.2, "opacity": 0.75},
            "encoding": {
                "x": across,
                "y": up,
                "color": colour,
                "detail": {"field": "line"},
                "description": {"field": "said"},
            },
        },
        {
            "data": {"values": marks},
            "mark": {**NAME, "align": "center", "baseline": "bottom", "dy": -2, "fontSize": 9},
            "encoding": {"x": across, "y": up, "text": {"field": "said"}},
        },
    ]
    said = "; ".join(dict.fromkeys(value["said"] for value in values))
    caption = "Settings and what came of them"
    spec = {"data": {"values": values}, "layer": layers, "config": CONFIG, "background": None}
    return Figure(caption, f"{caption}: {said}", {**spec, "width": max(PLANE, 62 * len(axes)), "height": 300})


def _told(axis: Axis, value: float) -> str:
    return axis.names[int(value)] if axis.names else number(value)


def sensitivity_figure(searched: Sequence[tuple[Row, Search]]) -> Figure | None:
    """What quantisation costs, over how much of the graph it takes."""
    curves = {row.target: sorted((100 * point.share, point.cosine) for point in found.curve) for row, found in searched}
    built = {row.target: 100 * (1 - len(found.left_in_float) / found.nodes) for row, found in searched}
    caption = "Mean cosine with FP32 over the share of nodes quantised, calibration set (ring: as built)"
    return _curves(curves, caption, "nodes quantised, %", "mean cosine", built=built)


def _curves(
    curves: dict[str, list[Point]],
    caption: str,
    x_title: str,
    y_title: str,
    is_log: bool = False,
    built: dict[str, float] | None = None,
) -> Figure | None:
    """A line for each name, which stands at its right end; a ring where `built` says."""
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    width = max(NARROW, WIDTH - 75 - LETTER * max(len(name) for name in curves))
    height = max(240, (LINE + 3) * len(curves))
    xs, ys = ([point[part] for points in curves.values() for point in points] for part in (0, 1))
    across, up = Scale.around(xs, is_log=is_log, margin=0.0), Scale.around(ys, is_log=is_log)
    across = replace(across, ticks=sorted(set(xs)) if is_log else None)
    values: list[dict[str, Any]] = [
        {"target": name, "x": x, "y": y, "said": f"{name}: {x:g}, {y:.6g}"}
        for name, points in curves.items()
        for x, y in points
    ]
    rings = [value for value in values if abs(value["x"] - (built or {}).get(value["target"], math.inf)) < 0.1]
    colour, dash = _styles(list(curves))
    place = {"x": _axis("x", across, x_title), "y": _axis("y", up, y_title), "color": colour}
    names = {"data": {"values": list(_end_places(curves, across, up, width, height))}}
    dot, said = {"type": "point", "filled": True, "size": 24, "opacity": 1}, {"field": "said"}
    layers: list[Spec] = [
        {**names, **_leaders("end_x", "end_y", "near_x", "name_y", colour)},
        {"mark": {"type": "line", "strokeWidth": 2, "aria": False}, "encoding": {**place, "strokeDash": dash}},
        {"mark": dot, "encoding": {**place, "description": said}},
        {"data": {"values": rings}, "mark": {"type": "point", "size": 110, "aria": False}, "encoding": place},
        {**names, **_names("name_x", "name_y")},
    ]
    return _figure(caption, values, layers, width=width, height=height)


def _end_places(
    curves: dict[str, list[Point]], across: Scale, up: Scale, width: float, height: float
) -> Iterator[dict[str, Any]]:
    """Where each line ends, and where its name stands beside the plane; in pixels."""
    ends = [(width * across.share(points[-1][0]), height * (1 - up.share(points[-1][1]))) for points in curves.values()]
    heights = spread([y for _, y in ends], 0, height)
    for name, end, at in zip(curves, ends, heights, strict=True):
        yield {
            "target": name,
            "end_x": end[0],
            "end_y": end[1],
            "near_x": width + 11,
            "name_x": width + 14,
            "name_y": at,
        }


def _styles(names: list[str]) -> tuple[Spec, Spec]:
    """A colour for each name, and another dash where the colours begin anew."""
    hues = [HUES[place % len(HUES)] for place in range(len(names))]
    dashes = [DASHES[place // len(HUES) % len(DASHES)] for place in range(len(names))]
    colour, dash = (
        {"field": "target", "scale": {"domain": names, "range": found}, "legend": None} for found in (hues, dashes)
    )
    return colour, dash


def _axis(field: str, scale: Scale, title: str) -> Spec:
    kind = {"type": "log"} if scale.is_log else {"zero": False}
    marks = scale.marks()
    ticks = {"values": marks, "labelExpr": "format(datum.value, ',~r')"} if marks else {"tickCount": 5}
    axis = {"title": title, **ticks}
    return {
        "field": field,
        "type": "quantitative",
        "scale": {**kind, "domain": [scale.low, scale.high], "nice": False},
        "axis": axis,
    }


def _target_axis(rows: Sequence[Row]) -> Spec:
    axis = {"title": None, "ticks": False, "domain": False, "labelColor": INK, "labelFont": NAME["font"]}
    return {
        "field": "target",
        "sort": None,
        "scale": {"domain": [row.target for row in rows], "paddingInner": 0.25},
        "axis": {**axis, "labelFontSize": NAME["fontSize"], "labelLimit": 0},
    }


def _pixels(**channels: str) -> Spec:
    return {channel: {"field": field, "type": "quantitative", "scale": None} for channel, field in channels.items()}


def _leaders(x: str, y: str, x2: str, y2: str, colour: Spec | None = None) -> Spec:
    """Lines from dots to their names, in pixels."""
    encoding = {**_pixels(x=x, y=y), "x2": {"field": x2}, "y2": {"field": y2}, "color": colour or {"value": DIM}}
    return {"mark": {**RULE, "strokeWidth": 0.75}, "encoding": encoding}


def _names(x: str, y: str) -> Spec:
    return {"mark": NAME, "encoding": {**_pixels(x=x, y=y), "text": {"field": "target"}}}


def _figure(caption: str, values: list[dict[str, Any]], layers: list[Spec], **size: Any) -> Figure:
    said = f"{caption}: {'; '.join(value['said'] for value in values)}"
    spec = {"data": {"values": values}, "layer": layers, "config": CONFIG, "background": None, **size}
    return Figure(caption, said, spec)


def _decided(row: Row, tower: str, key: str) -> float | None:
    timing = row.timing(tower)
    found: float | None = None if timing is None or timing.undecided else getattr(timing, key)
    return found


def _accuracy(row: Row, judged: bool) -> float | None:
    if judged:
        return row.zero_shot.top1 if row.zero_shot else None
    return min(row.cosine_min.values(), default=None)


def _smallest(rows: Sequence[Row]) -> str:
    return str(min(batch for row in rows for sizes in row.timings.values() for batch in sizes))
