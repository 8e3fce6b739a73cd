"""Write the report: Markdown, page, metrics and plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_deploy.core.artifact import read_target
from clip_deploy.core.environment import Environment
from clip_deploy.core.files import write_text
from clip_deploy.core.json_files import read_json, write_json
from clip_deploy.core.model import Model
from clip_deploy.core.parsing import read_record
from clip_deploy.core.recommendation import Recommendation
from clip_deploy.core.records import EndToEnd, StoredVectors
from clip_deploy.core.served import HttpServed, Served
from clip_deploy.report.contents import Report
from clip_deploy.report.markdown import markdown
from clip_deploy.report.page import page
from clip_deploy.report.recommend import shown
from clip_deploy.report.rows import Row, metrics, plots


def write_report(report: Report, output: Path) -> None:
    """Write report.md, report.html, metrics.json, targets.json and plots/*.json into `output`."""
    write_json(output / "metrics.json", report.summary)
    write_json(output / "targets.json", metrics(report.rows))
    for name, content in plots(report.rows).items():
        write_json(output / "plots" / f"{name}.json", content)
    write_text(output / "report.md", markdown(report))
    write_text(output / "report.html", page(report))


def gather(
    rows: list[Row],
    flows: Mapping[str, EndToEnd],
    model_name: str,
    data_name: str,
    environment: Path,
    checkpoint: Path,
    evaluation: Path,
    recommendation: Path,
    served: Path,
    serving: Path,
    vectors: Path,
) -> Report:
    """All that the report says, from the rows, what was timed end to end, and the files of the other stages."""
    machine = read_record(Environment, environment, null_is_nan=False)
    model, advice = read_target(checkpoint).model, read_record(Recommendation, recommendation, null_is_nan=False)
    return Report(
        title=entitle(model_name, machine, rows),
        rows=rows,
        about=describe_inputs(model_name, model, data_name, read_json(evaluation / "manifest.json")),
        run=describe_run(machine, rows),
        flows=flows,
        shipping=shown(advice, rows),
        summary=advice.summary,
        findings=model.findings,
        served=read_record(Served, served),
        serving=read_record(HttpServed, serving),
        vectors=read_record(StoredVectors, vectors),
    )


def entitle(model: str, environment: Environment, rows: list[Row]) -> str:
    """The model and what it ran on: the GPUs where a row did on one."""
    hardware = environment.hardware
    on = ", ".join(hardware.gpus) if any(row.device == "cuda" for row in rows) else ""
    return f"{model} on {on or hardware.cpu}"


def describe_inputs(model: str, checkpoint: Model, data: str, evaluation: dict[str, Any]) -> dict[str, str]:
    """The lines above the table: model and data."""
    towers = ", ".join(
        f"{name} {shape.layers} layers of width {shape.width}" for name, shape in checkpoint.towers.items()
    )
    weights = "" if checkpoint.trained else "; random weights, so accuracy is shown and not judged"
    images, captions, classes = evaluation["images"], evaluation["captions"], len(evaluation["classes"])
    prompts = f"; prompts: {', '.join(repr(template) for template in evaluation['templates'])}" if classes else ""
    return {
        "Model": f"{model} ({checkpoint.model_type}; {towers}){weights}",
        "Data": f"{data}: {images} images, {captions} captions, {classes} classes{prompts}",
    }


def describe_run(environment: Environment, rows: list[Row]) -> dict[str, str]:
    """The lines at the end: machine and versions."""
    hardware = environment.hardware
    threads = next((f"; {row.threads} threads for each process" for row in rows if row.threads), "")
    return {
        "Machine": f"{hardware.cpu}, {hardware.cores} cores, {hardware.memory_gb} GB, {hardware.system}, "
        f"GPU: {', '.join(hardware.gpus) or 'none'}{threads}",
        "Instruction sets": f"{', '.join(hardware.instruction_sets) or 'unknown'} (INT8 accuracy holds for these)",
        "Versions": ", ".join(f"{name} {number}" for name, number in environment.software.items() if number),
    }
