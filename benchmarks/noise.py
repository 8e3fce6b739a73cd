"""Time targets against themselves, in pairs of processes: how honest are the intervals on this machine?

    python -m benchmarks.noise            # on what the last repro built; writes reports/noise.md, about 3 minutes

The truth is known, 1: a 95 % interval should leave it out in 1 of 20.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from clip_deploy.core.config import BenchmarkConfig
from clip_deploy.core.environment import hardware
from clip_deploy.core.files import write_text
from clip_deploy.report.decisive import self_spread, widened
from clip_deploy.report.tables import number, table
from clip_deploy.timing import latency

REFERENCE, REST = "torch-fp32", "ort-fp32"
PAIRS = {REFERENCE: 4, REST: 8}  # of processes
SETTINGS = BenchmarkConfig(batch_sizes=[1, 8, 32], threads=2, iterations=100_000, seconds=0.6)
HEAD = ["Target", "Tower", "Batch", "Timings", "Turns", "Leave 1 out", "Furthest from 1", "Turn to turn"]


def main() -> None:
    built = Path(dict(word.split("=", 1) for word in sys.argv[1:]).get("built", "artifacts"))
    rows, timings, spreads = [], [], []
    for target, pairs in PAIRS.items():
        found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
        for _ in range(pairs):
            with turns_kept() as turns:
                towers = latency.measure(built / target, built / target, SETTINGS)["towers"]
            if target == REFERENCE:
                spreads.append(self_spread(towers))
            shown = [(tower, batch) for batch in SETTINGS.batch_sizes for tower in ("vision", "text")]
            for (tower, batch), ratios in zip(shown, turns, strict=True):
                row = towers[tower][str(batch)] | {"turns": len(ratios), "lasting": correlation(ratios)}
                found[tower, batch].append(row)
                timings.append(row)
        rows += [[target, tower, str(batch), *cells(some)] for (tower, batch), some in sorted(found.items())]
    machine, rest = hardware(), PAIRS[REST] * 2 * len(SETTINGS.batch_sizes)
    lines = [
        f"# Targets against themselves on {machine['cpu']}, {machine['cores']} cores",
        "",
        f"`python -m benchmarks.noise`: {SETTINGS.seconds:g} s each side, a pair of processes for each timing. Turn to "
        "turn: the correlation of neighbouring turns' ratios (lag 1, outliers clipped), its mean.",
        "",
        *table(HEAD, rows),
        "",
        f"All: {outside(timings)} of {len(timings)} intervals leave 1 out (5 % would be "
        f"{0.05 * len(timings):.1f}), correlation {mean(row['lasting'] for row in timings):.2f}.",
        "",
        f"The report widens intervals by the furthest from 1 that the reference came out against itself, here "
        f"{', '.join(f'{spread:.3f}' for spread in spreads)}: so widened, {REST} leaves 1 out in "
        f"{100 * mean(outside(timings[-rest:], spread) for spread in spreads) / rest:.0f} % of its timings.",
        "",
    ]
    write_text(Path("reports/noise.md"), "\n".join(lines))
    print("\n".join(lines))


@contextmanager
def turns_kept() -> Iterator[list[np.ndarray]]:
    """The logarithms of the turns' ratios, of each timing in its order."""
    summarize, kept = latency.summarize, []

    def keeping(turns: list[list[float]], reference: list[list[float]], batch: int) -> dict[str, Any]:
        kept.append(np.log([median(theirs) / median(ours) for ours, theirs in zip(turns, reference, strict=True)]))
        return summarize(turns, reference, batch)

    latency.summarize = keeping
    try:
        yield kept
    finally:
        latency.summarize = summarize


def correlation(ratios: np.ndarray) -> float:
    """Of neighbours; values beyond three standard deviations, as the median tells them, count as three."""
    centred = ratios - np.median(ratios)
    bound = 3 * 1.4826 * np.median(np.abs(centred))
    clipped = np.clip(centred, -bound, bound)
    return float(np.sum(clipped[1:] * clipped[:-1]) / np.sum(clipped**2))


def outside(some: list[dict[str, Any]], spread: float = 1.0) -> int:
    ends = [widened(row, spread) for row in some]
    return sum(not low <= 1 <= high for low, high in ends)


def cells(some: list[dict[str, Any]]) -> list[str]:
    furthest = max((row["speedup"] for row in some), key=lambda speedup: abs(np.log(speedup)))
    lasting = f"{mean(row['lasting'] for row in some):.2f}"
    return [
        str(len(some)),
        number(median(row["turns"] for row in some)),
        str(outside(some)),
        f"{furthest:.3f}",
        lasting,
    ]


if __name__ == "__main__":
    main()
