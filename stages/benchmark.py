"""Time one target against the reference, each in a process of its own, call by call in turn."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import BenchmarkConfig
from clip_deploy.core.json_files import write_json
from clip_deploy.core.parsing import plain
from clip_deploy.core.records import Timing
from clip_deploy.timing.latency import measure
from stages import stage


@dataclass
class Settings:
    benchmark: BenchmarkConfig = MISSING
    source: Path = MISSING
    reference: Path = MISSING
    output: Path = MISSING


@stage
def benchmark(settings: Settings) -> None:
    record = measure(settings.source, settings.reference, settings.benchmark)
    write_json(settings.output, plain(record))
    if record.status == "unavailable":
        print(f"{settings.source.name}: unavailable: {record.reason}")
    for tower, sizes in record.towers.items():
        for batch, timing in sizes.items():
            print(f"{settings.source.name} {tower} batch {batch}: {said(timing)}")


def said(timing: Timing) -> str:
    interval = f"{timing.speedup:.2f}x [{timing.speedup_low:.2f}, {timing.speedup_high:.2f}]"
    if timing.is_wide:
        return f"p50 {timing.p50_ms:.2f} ms, ~ {interval}, which decides nothing: the machine was busy"
    return f"p50 {timing.p50_ms:.2f} ms, {interval}"


if __name__ == "__main__":
    benchmark()
