"""What a timing may decide: one rule for the report, the metrics and plots, the advice and the gate.

On a CPU rows are compared by their speed-up over the reference, with which they took turns. Where its interval is wide,
or far from the ratio of both medians, or the reference was far slower than beside another row, the machine was busy.
The row's own calls ran on the same busy cores: no number of such a timing decides anything.
On a GPU rows are compared by p50. The reference's small batches wait for Python there, so a spoiled speed-up says
nothing of the row's other numbers; its own calls do.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf

from clip_deploy.core.config import REFERENCE
from clip_deploy.core.records import WIDE, Timing

DRIFT = 2.0  # of the reference between the rows of a run: frequencies and neighbours move latencies by less
APART = 1.25  # of the medians' ratio from the interval of the turns' ratios; on a quiet machine 1.01
BETWEEN_RUNS = 1.06  # of p50 on a GPU, 95 % within: reports/hardware/nvidia-h200/between_runs.md

Timings = dict[str, dict[int, Timing]]  # by tower and batch size


@dataclass(frozen=True, kw_only=True)
class Judged(Timing):
    """A timing with intervals as wide as they must be.

    Attributes:
        unstable: the speed-up decides nothing.
        undecided: no number of it does.
    """

    unstable: bool
    undecided: bool


JudgedTimings = dict[str, dict[int, Judged]]


@dataclass(frozen=True)
class Pace:
    """How long a call takes, with its 95 % interval: a share of the reference's time on a CPU, ms on a GPU."""

    middle: float
    low: float
    high: float


def judged(rows: dict[str, Timings], on_gpu: Container[str]) -> dict[str, JudgedTimings]:
    """The timings of all rows of a run, by target, judged.

    Speed-ups are widened by what the reference differed from itself. On a GPU its small batches wait for Python, whose
    speed in one process is not that in another, and its large ones do not: there, it is what it differed by at that
    batch size or a larger one, and p50_low_ms and p50_high_ms are widened by BETWEEN_RUNS.
    """
    own, quickest = rows.get(REFERENCE, {}), _quickest(rows)
    return {
        name: {
            tower: {
                batch: _judged(timing, own, quickest[tower, batch], batch, name in on_gpu)
                for batch, timing in sizes.items()
            }
            for tower, sizes in timings.items()
        }
        for name, timings in rows.items()
    }


def _quickest(rows: dict[str, Timings]) -> dict[tuple[str, int], float]:
    """By tower and batch size, the reference's p50 in ms beside the row where it was lowest: noise only slows."""
    found: dict[tuple[str, int], float] = defaultdict(lambda: inf)
    for timings in rows.values():
        for tower, sizes in timings.items():
            for batch, timing in sizes.items():
                found[tower, batch] = min(found[tower, batch], timing.reference_p50_ms)
    return found


def _judged(timing: Timing, own: Timings, quickest_ms: float, batch: int, on_gpu: bool) -> Judged:
    low, high = widened(timing, self_spread(own, batch if on_gpu else 1))
    aside = BETWEEN_RUNS**0.5 if on_gpu else 1.0  # so that two rows within it overlap
    wide = replace(
        timing,
        speedup_low=low,
        speedup_high=high,
        p50_low_ms=timing.p50_low_ms / aside,
        p50_high_ms=timing.p50_high_ms * aside,
    )
    unstable = wide.is_wide or not timing.reference_p50_ms < DRIFT * quickest_ms or _is_contradicted(wide)  # so is NaN
    undecided = not (timing.p90_ms or 0.0) <= WIDE * timing.p50_ms if on_gpu else unstable
    return Judged(**vars(wide), unstable=unstable, undecided=undecided)


def _is_contradicted(timing: Timing) -> bool:
    """Whether the medians over all calls say otherwise than the turns: most of one side's turns were disturbed."""
    apart = timing.reference_p50_ms / timing.p50_ms
    return not timing.speedup_low / APART <= apart <= timing.speedup_high * APART


def self_spread(reference: Timings, least_batch: int = 1) -> float:
    """The furthest from 1 that the reference's speed-up over itself came out from that batch size up, as a factor.

    A timing's own interval holds what varied while two processes ran. What they keep for as long as they live, as where
    their memory lies, only another pair of processes shows: the reference's row is one (reports/noise.md has many).
    """
    found = [timing.speedup for sizes in reference.values() for batch, timing in sizes.items() if batch >= least_batch]
    return max((max(speedup, 1 / speedup) for speedup in found), default=1.0)


def widened(timing: Timing, spread: float) -> tuple[float, float]:
    """The interval of a speed-up, both ends moved by `self_spread`."""
    return timing.speedup_low / spread, timing.speedup_high * spread


def undecided(timings: JudgedTimings) -> Iterator[str]:
    """Each tower and batch size of judged timings that decides nothing, as "vision, batch 8"."""
    for tower, sizes in timings.items():
        yield from (f"{tower}, batch {batch}" for batch, timing in sizes.items() if timing.undecided)


def pace(timing: Timing, on_gpu: bool) -> Pace:
    """What rows are compared by. Latencies of rows timed minutes apart on a CPU carry the machine's drift."""
    if on_gpu:
        return Pace(timing.p50_ms, timing.p50_low_ms, timing.p50_high_ms)
    return Pace(1 / timing.speedup, 1 / timing.speedup_high, 1 / timing.speedup_low)


def again(targets: Iterable[str]) -> str:
    """The command that times these targets again, and the reference's own row, which all are held against."""
    names = dict.fromkeys([REFERENCE, *targets])
    return f"`dvc repro --force --single-item {' '.join(f'benchmark@{name}' for name in names)} && dvc repro`"
