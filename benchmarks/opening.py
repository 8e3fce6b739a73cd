"""Time how long a target takes to be ready on a GPU: python -m benchmarks.opening source=artifacts/torch-fused-fp16

Opens the target in new processes. Each prepares both towers at batches of 1 to 256: with an empty cache, with all in
it, and with compiled kernels but no choice among them. On all cores, then on one (there not with all in the cache);
cores=16,4,1 says otherwise. Prints a table; `output=FILE` writes it too.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
import triton

from clip_deploy.core.artifact import TOWERS, Target, read_target
from clip_deploy.core.config import BenchmarkConfig
from clip_deploy.core.environment import cores
from clip_deploy.core.files import write_text
from clip_deploy.report.tables import number, table
from clip_deploy.runtimes import choices
from clip_deploy.timing.latency import LatencyWorker, shape_request

BATCHES = (1, 8, 32, 256)
HEAD = ["Cores", "In the cache", "Open s", *(f"{tower} @{batch} s" for tower in TOWERS for batch in BATCHES), "All s"]


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    source = Path(given["source"])
    counts = [int(count) for count in given.get("cores", f"{cores()},1").split(",")]
    if read_target(source).device != "cuda":
        sys.exit(f"error: {source} is not built for a GPU: `clip-deploy device cuda`, and build it there")
    lines = [
        f"# Opening {source.name} on {torch.cuda.get_device_name()}",
        "",
        f"`python -m benchmarks.opening`: torch {torch.__version__}, triton {triton.__version__}; seconds from a "
        "process's start until the target is open, and until each tower's first call of a batch size has ended.",
        "",
        *table(HEAD, list(rows(source, counts))),
        "",
    ]
    print("\n".join(lines))
    if "output" in given:
        write_text(Path(given["output"]), "\n".join(lines))


def rows(source: Path, counts: list[int]) -> Iterator[list[str]]:
    available = sorted(os.sched_getaffinity(0))
    for count in counts:
        os.sched_setaffinity(0, available[:count])
        with TemporaryDirectory() as cache:
            kept = Path(cache) / "choices"
            os.environ |= {choices.FOLDER: str(kept), "TRITON_CACHE_DIR": str(Path(cache) / "kernels")}
            yield row("nothing", source)
            if count == counts[0]:
                yield row("kernels and choices", source)
            shutil.rmtree(kept)
            yield row("kernels", source)
    os.sched_setaffinity(0, available)


def row(held: str, source: Path) -> list[str]:
    seconds = opened(source, read_target(source))
    shown = [str(cores()), held, *map(number, seconds), number(sum(seconds))]
    print(" | ".join(shown), flush=True)
    return shown


def opened(source: Path, described: Target) -> list[float]:
    """Seconds of opening the target, and of each tower's first call of each batch size."""
    settings = BenchmarkConfig()
    marks = [perf_counter()]
    with LatencyWorker(source, cores()) as worker:
        worker.wait()
        marks.append(perf_counter())
        for tower in TOWERS:
            for batch in BATCHES:
                worker.ask(shape_request(tower, batch, described, settings))
                worker.ask({"calls": 1})
                marks.append(perf_counter())
    return [end - start for start, end in pairwise(marks)]


if __name__ == "__main__":
    main()
