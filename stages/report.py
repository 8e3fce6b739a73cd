"""Gather the configured targets' results into report.md, report.html, targets.json, metrics.json and the plots."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import EndToEndConfig
from clip_deploy.report.rows import doubts, read_flows, read_rows
from clip_deploy.report.write import gather, write_report
from stages import stage


@dataclass
class Settings:
    targets: list[str] = field(default_factory=list)
    end_to_end: EndToEndConfig = MISSING
    model_name: str = MISSING
    data_name: str = MISSING
    environment: Path = MISSING
    checkpoint: Path = MISSING
    evaluation: Path = MISSING
    validation: Path = MISSING
    benchmark_results: Path = MISSING
    recommendation: Path = MISSING
    served: Path = MISSING
    serving: Path = MISSING
    vectors: Path = MISSING
    output: Path = MISSING


@stage
def report(settings: Settings) -> None:
    rows = read_rows(settings.targets, settings.validation, settings.benchmark_results)
    flows = read_flows(settings.end_to_end.targets, settings.benchmark_results / "end_to_end")
    inputs = settings.environment, settings.checkpoint, settings.evaluation, settings.recommendation
    checked = settings.served, settings.serving, settings.vectors
    gathered = gather(rows, flows, settings.model_name, settings.data_name, *inputs, *checked)
    write_report(gathered, settings.output)
    counts = f"{len(rows)} targets, {sum(row.status == 'pass' for row in rows)} pass"
    print(f"{settings.output / 'report.md'}: {'; '.join([*doubts(rows), counts])}")


if __name__ == "__main__":
    report()
