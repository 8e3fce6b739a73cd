"""Write the report: table, page, metrics and plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_deploy.core.files import write_text
from clip_deploy.core.json_files import write_json
from clip_deploy.report.decisive import pace
from clip_deploy.report.markdown import markdown
from clip_deploy.report.page import page
from clip_deploy.report.rows import Row, metrics, plots
from clip_deploy.report.tables import _speedup, number


def write_report(
    rows: list[Row],
    environment: dict[str, Any],
    checkpoint: dict[str, Any],
    evaluation: dict[str, Any],
    settings: dict[str, str],
    flows: list[dict[str, Any]],
    output: Path,
    sections: Sequence[str] = (),
    shipping: dict[str, Any] | None = None,
) -> None:
    """Write report.md (with the lines of `sections`), report.html, metrics.json and plots/*.json into `output`.

    `shipping` is what recommend.shown says.
    """
    hardware = environment["hardware"]
    on = ", ".join(hardware["gpus"]) if any(row.device == "cuda" for row in rows) else ""
    title = f"{settings['model']} on {on or hardware['cpu']}"
    write_json(output / "metrics.json", metrics(rows))
    for name, content in plots(rows).items():
        write_json(output / "plots" / f"{name}.json", content)
    facts = describe_run(rows, environment, checkpoint, evaluation, settings)
    findings = checkpoint.get("findings", [])
    write_text(output / "report.md", markdown(title, rows, facts, flows, sections, shipping, findings))
    write_text(output / "report.html", page(title, rows, facts, flows, shipping, findings, sections))


def describe_run(
    rows: list[Row],
    environment: dict[str, Any],
    checkpoint: dict[str, Any],
    evaluation: dict[str, Any],
    settings: dict[str, str],
) -> dict[str, str]:
    """The lines above the table: model, data, machine, versions."""
    hardware, software = environment["hardware"], environment["software"]
    towers = ", ".join(
        f"{name} {shape['layers']} layers of width {shape['width']}" for name, shape in checkpoint["towers"].items()
    )
    weights = "" if checkpoint.get("trained", True) else "; random weights, so accuracy is shown and not judged"
    images, captions, classes = evaluation["images"], evaluation["captions"], len(evaluation["classes"])
    prompts = f"; prompts: {', '.join(repr(template) for template in evaluation['templates'])}" if classes else ""
    threads = next((f"; {row.threads} threads for each process" for row in rows if row.threads), "")
    return {
        "Model": f"{settings['model']} ({checkpoint['model_type']}; {towers}){weights}",
        "Data": f"{settings['data']}: {images} images, {captions} captions, {classes} classes{prompts}",
        "Machine": f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gb']} GB, {hardware['system']}, "
        f"GPU: {', '.join(hardware['gpus']) or 'none'}{threads}",
        "Instruction sets": f"{', '.join(hardware['instruction_sets']) or 'unknown'} (INT8 accuracy holds for these)",
        "Versions": ", ".join(f"{name} {number}" for name, number in software.items() if number),
        "Fastest row that passes its gate": fastest(rows),
    }


def fastest(rows: list[Row]) -> str:
    """Per tower at the smallest batch, among the timings that decide."""
    named = []
    for tower in ("vision", "text"):
        fit = [row for row in rows if row.status == "pass" and row.timing(tower)]
        steady = [row for row in fit if not row.timing(tower)["undecided"]]
        if on_gpu := [row for row in steady if row.device == "cuda"]:
            best = min(on_gpu, key=lambda row: pace(row.timing(tower), True).middle)
            named.append(f"{best.target} ({tower}, {number(best.timing(tower)['p50_ms'])} ms)")
        elif steady:
            best = min(steady, key=lambda row: pace(row.timing(tower), False).middle)
            named.append(f"{best.target} ({tower}, {_speedup(best.timing(tower))})")
    return ", ".join(named) or "none"
