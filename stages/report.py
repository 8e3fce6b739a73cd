"""Gather the configured targets' results into report.md, report.html, metrics.json and the plots."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.artifact import read_target
from clip_deploy.core.config import EndToEndConfig
from clip_deploy.core.json_files import read_json
from clip_deploy.report.gpu_sections import gpu_sections
from clip_deploy.report.recommend import Recommendation, shown
from clip_deploy.report.rows import doubts, read_flows, read_rows
from clip_deploy.report.triton_sections import triton_sections
from clip_deploy.report.write import write_report
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
    output: Path = MISSING


@stage
def report(settings: Settings) -> None:
    rows = read_rows(settings.targets, settings.validation, settings.benchmark_results)
    flows = read_flows(settings.end_to_end.targets, settings.benchmark_results / "end_to_end")
    environment, evaluation = read_json(settings.environment), read_json(settings.evaluation / "manifest.json")
    model, names = read_target(settings.checkpoint).model, {"model": settings.model_name, "data": settings.data_name}
    sections = gpu_sections(rows) + triton_sections(read_json(settings.served))
    advice = shown(Recommendation(**read_json(settings.recommendation)), rows)
    write_report(rows, environment, model, evaluation, names, flows, settings.output, sections, advice)
    counts = f"{len(rows)} targets, {sum(row.status == 'pass' for row in rows)} pass"
    print(f"{settings.output / 'report.md'}: {'; '.join([*doubts(rows), counts])}")


if __name__ == "__main__":
    report()
