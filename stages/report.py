"""Gather the configured targets' results into report.md, report.html, metrics.json and the plots."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.artifact import read_target
from clip_deploy.gpu_report import gpu_sections
from clip_deploy.report import read_rows, write_report
from clip_deploy.results import read_json
from stages import stage


@dataclass
class Settings:
    targets: list[str] = field(default_factory=list)
    model_name: str = MISSING
    data_name: str = MISSING
    environment: Path = MISSING
    checkpoint: Path = MISSING
    evaluation: Path = MISSING
    validation: Path = MISSING
    benchmark_results: Path = MISSING
    output: Path = MISSING


@stage
def report(settings: Settings) -> None:
    rows = read_rows(settings.targets, settings.validation, settings.benchmark_results)
    write_report(
        rows,
        read_json(settings.environment),
        read_target(settings.checkpoint).model,
        read_json(settings.evaluation / "manifest.json"),
        {"model": settings.model_name, "data": settings.data_name},
        settings.output,
        gpu_sections(rows),
    )
    print(f"{settings.output / 'report.md'}: {len(rows)} targets, {sum(row.status == 'pass' for row in rows)} pass")


if __name__ == "__main__":
    report()
