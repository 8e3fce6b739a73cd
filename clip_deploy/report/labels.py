"""Where names stand in a plot, so that none covers a dot, another name or a line that leads to one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom

LETTER, LINE = 6.05, 12.0  # a letter's width and a line's height in pixels, of a fixed-width font of 10 pixels
DOT = 6.0  # half of what a dot takes
NEAR = 12.0  # so far from its dot a name needs no line
TURNS = [
    0,
    180,
    45,
    315,
    135,
    225,
    *(turn for turn in range(15, 360, 15) if turn % 45),
    90,
    270,
]  # degrees, the best place first


@dataclass(frozen=True)
class Label:
    """A name's left end and middle line, and what of it lies next to its dot; in pixels from the top left."""

    x: float
    y: float
    near: Point


def place_labels(dots: Sequence[Point], names: Sequence[str], width: float, height: float) -> list[Label]:
    """Each beside its dot or as near as there is room; beside it, over others, where the whole plane has none."""
    dotted = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in dots]
    written: list[Box] = []
    placed = {}
    for place in sorted(range(len(dots)), key=lambda place: dots[place]):
        length, others = LETTER * len(names[place]), dotted[:place] + dotted[place + 1 :]
        apart = [box for box in others if not _meet(box, dotted[place])]  # a line may start among dots that overlap
        candidates = list(_candidates(dots[place], length, math.hypot(width, height)))
        inside = [label for label in candidates if _lies_in(_box(label, length), width, height)]
        free = [label for label in inside if not _meets(_box(label, length), others + written)]
        clear = (label for label in free if not _crosses(dots[place], label, apart + written))
        found = placed[place] = next(clear, next(iter(free), candidates[0]))
        written += [_box(found, length), *_dotted(dots[place], found.near)]
    return [placed[place] for place in range(len(dots))]


def _lies_in(box: Box, width: float, height: float) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height


def _crosses(dot: Point, label: Label, taken: list[Box]) -> bool:
    """Whether the line to a name runs over something."""
    return any(_meets(part, taken) for part in _dotted(dot, label.near))


def _meets(box: Box, taken: list[Box]) -> bool:
    return any(_meet(box, other) for other in taken)


def _candidates(dot: Point, length: float, furthest: float) -> Iterator[Label]:
    """Rings of places around a dot, the nearest first; a line ends at the side of the name that looks at the dot."""
    for step in range(1, int(furthest / NEAR)):
        for turn in TURNS:
            aside, above = math.cos(math.radians(turn)), math.sin(math.radians(turn))
            x, y = dot[0] + step * NEAR * aside, dot[1] - step * NEAR * above
            if abs(aside) < 0.1:
                yield Label(x - length / 2, y, (x, y + above * LINE / 2))
            else:
                yield Label(x if aside > 0 else x - length, y, (x - math.copysign(2, aside), y))


def _box(label: Label, length: float) -> Box:
    return label.x, label.y - LINE / 2, label.x + length, label.y + LINE / 2


def _dotted(dot: Point, end: Point) -> list[Box]:
    """The line to a name as small boxes; none where the name is near."""
    steps = int(math.dist(dot, end) / 4)
    if math.dist(dot, end) <= NEAR + 1:
        return []
    points = [(dot[0] + (end[0] - dot[0]) * i / steps, dot[1] + (end[1] - dot[1]) * i / steps) for i in range(2, steps)]
    return [(x - 1, y - 1, x + 1, y + 1) for x, y in points]


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def spread(heights: Sequence[float], low: float, high: float) -> list[float]:
    """Heights near the given ones, in their order, a line's height apart and between the bounds if they fit there."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    found = [0.0] * len(heights)
    least = low
    for place in order:
        least = found[place] = max(heights[place], least)
        least += LINE
    most = high
    for place in reversed(order):
        most = found[place] = min(found[place], most)
        most -= LINE
    return found
