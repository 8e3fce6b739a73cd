"""The report: one row a target, from what validate and benchmark wrote, as a table, a page, metrics and plots."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from clip_deploy.core.artifact import write_text
from clip_deploy.core.config import REFERENCE
from clip_deploy.core.results import read_json, rounded, write_json
from clip_deploy.decisive import BETWEEN_RUNS, again, judged, pace, undecided

PAGE = Path(__file__).with_name("report.html")
MISSING = "-"
MOST_SENSITIVE = 5  # nodes named in the report; all are in reports/validate/


@dataclass
class Row:
    """One target of the table. Numbers are None where they were not or could not be measured."""

    target: str
    status: str  # pass, fail, unavailable
    reasons: list[str] = field(default_factory=list)
    precision: str = ""
    build: str = ""
    trained: bool = True
    doubts: list[str] = field(default_factory=list)  # of the reference: chance.doubts
    timings: dict[str, Any] = field(default_factory=dict)  # tower -> batch size -> percentiles, throughput, speed-up
    threads: int | None = None
    memory_mb: float | None = None
    size_mb: float | None = None
    cosine_min: dict[str, float] = field(default_factory=dict)  # tower -> lowest cosine of any row
    zero_shot: dict[str, float] = field(default_factory=dict)
    retrieval: dict[str, float] = field(default_factory=dict)
    flips: float | None = None
    attention: str = ""
    graphs: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)  # sensitivity.Search
    pixels: dict[str, float] = field(default_factory=dict)  # pixels.pixel_parity
    classifier: dict[str, Any] = field(default_factory=dict)  # validation.head
    device: str = "cpu"
    gpu_memory_mb: float | None = None
    power: dict[str, Any] = field(default_factory=dict)  # timing.measure's
    matrix_tflops: float | None = None
    placement: dict[str, Any] = field(default_factory=dict)  # tower -> nodes by provider, and whether a CUDA graph
    preprocessed_size: list[int] = field(default_factory=list)  # of the images that it was timed with: height, width
    runtime: str = ""
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of what was judged
    diagnosis: dict[str, Any] = field(default_factory=dict)  # diagnosis.diagnose, where it missed its gate

    def timing(self, tower: str, batch: str | None = None) -> dict[str, Any]:
        """One tower's timing at a batch size, the smallest if none is named; empty where it was not timed."""
        sizes = self.timings.get(tower, {})
        return sizes.get(batch or next(iter(sizes), ""), {})

    def is_undecided(self, tower: str, batch: str | None = None) -> bool:
        """Whether that tower's timing at a batch size decides nothing, or any of its timings if none is named."""
        sizes = self.timings.get(tower, {})
        return any(timing["undecided"] for size, timing in sizes.items() if batch in (None, size))


def read_rows(targets: list[str], validation: Path, benchmark: Path) -> list[Row]:
    """Read the configured targets' results, the reference first; timings carry the marks of decisive.judged."""
    rows = [_read_row(target, validation, benchmark) for target in targets]
    on_gpu = {row.target for row in rows if row.device == "cuda"}
    timings = judged({row.target: row.timings for row in rows}, on_gpu)
    return [replace(row, timings=timings[row.target]) for row in rows]


def _read_row(target: str, validation: Path, benchmark: Path) -> Row:
    checked = read_json(validation / f"{target}.json")
    timed = read_json(benchmark / f"{target}.json")
    status, reasons = checked["status"], list(checked["reasons"])
    if status != "unavailable" and timed["status"] == "unavailable":
        status, reasons = "fail", [*reasons, f"not timed: {timed['reason']}"]
    graphs = checked.get("graphs", {})
    return Row(
        target=target,
        status=status,
        reasons=reasons,
        precision=checked["precision"],
        build=_build(checked["build"]),
        trained=checked["trained"],
        doubts=checked.get("doubts", []),
        timings=timed.get("towers", {}),
        threads=timed.get("threads"),
        memory_mb=timed.get("memory_mb"),
        size_mb=timed.get("size_mb", checked.get("size_mb")),
        cosine_min={tower: parity["cosine_min"] for tower, parity in checked.get("parity", {}).items()},
        zero_shot=checked.get("zero_shot", {}),
        retrieval=checked.get("retrieval", {}),
        flips=checked.get("flips"),
        attention=_attention(graphs),
        graphs=graphs,
        search=checked.get("search", {}),
        pixels=checked.get("pixels", {}),
        classifier=checked.get("classifier", {}),
        device=checked.get("device", "cpu"),
        gpu_memory_mb=timed.get("gpu_memory_mb"),
        power=timed.get("power", {}),
        matrix_tflops=timed.get("matrix_tflops"),
        placement=checked.get("placement", {}),
        preprocessed_size=timed.get("preprocessed_size", []),
        runtime=checked.get("runtime", ""),
        files=checked.get("files", {}),
        diagnosis=checked.get("diagnosis", {}),
    )


def _build(build: dict[str, Any]) -> str:
    """How a target was made, in words."""
    if "note" in build:
        return build["note"]
    return ", ".join(f"{key.replace('_', ' ')} {_word(value)}" for key, value in build.items())


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "nothing"
    if isinstance(value, dict):
        return " and ".join(f"{key} {item}" for key, item in value.items())
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _attention(graphs: dict[str, Any]) -> str:
    """Fused attentions of both towers out of all, "6/6"."""
    if not graphs:
        return ""
    fused = sum(graph["fusion"]["attention"] for graph in graphs.values())
    return f"{fused}/{sum(graph['fusion']['attention_expected'] for graph in graphs.values())}"


def read_flows(targets: list[str], folder: Path) -> list[dict[str, Any]]:
    """What end_to_end.measure_feeds found for each target, with its name."""
    return [{"target": target, **read_json(folder / f"{target}.json")} for target in targets]


def metrics(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """The decisive numbers for `dvc metrics diff`, keyed <target>.<quantity>_<unit>.

    What was measured and decides nothing is None; where that is all of a timing, `timing` says "undecided".
    """
    return {row.target: {**_measured(row), **_withheld(row)} for row in rows}


def _measured(row: Row) -> dict[str, Any]:
    vision, text = row.timing("vision"), row.timing("text")
    found = {
        "status": row.status,
        "vision_p50_ms": vision.get("p50_ms"),
        "text_p50_ms": text.get("p50_ms"),
        "vision_speedup": vision.get("speedup"),
        "text_speedup": text.get("speedup"),
        "images_per_s": best_throughput(row, "vision"),
        "memory_mb": row.memory_mb,
        "gpu_memory_mb": row.gpu_memory_mb,
        "j_per_1000_images": row.power.get("j_per_1000_images"),
        "size_mb": row.size_mb,
        "cosine_min": min(row.cosine_min.values(), default=None),
        "top1_percent": row.zero_shot.get("top1"),
        "top1_drop_points": row.zero_shot.get("top1_drop"),
        "flips_percent": row.flips,
        "image_to_text_r1_percent": row.retrieval.get("image_to_text_r1"),
        "text_to_image_r1_percent": row.retrieval.get("text_to_image_r1"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _withheld(row: Row) -> dict[str, Any]:
    """None for each number of speed that decides nothing; the best of all batch sizes needs every one of them."""
    keys: list[str] = []
    for tower in row.timings:
        timing = row.timing(tower)
        keys += [f"{tower}_p50_ms"] if timing.get("undecided") else []
        keys += [f"{tower}_speedup"] if timing.get("unstable") else []
    if row.is_undecided("vision"):
        keys += ["images_per_s", *(["j_per_1000_images"] if row.power else [])]
    return {**dict.fromkeys(keys), **({"timing": "undecided"} if any(undecided(row.timings)) else {})}


def best_throughput(row: Row, tower: str) -> float | None:
    """Images or texts per second at the best batch size."""
    return max((timing["throughput_per_s"] for timing in row.timings.get(tower, {}).values()), default=None)


def plots(rows: list[Row]) -> dict[str, list[dict[str, Any]]]:
    """Flat rows for `dvc plots`: latency, throughput over batch sizes, accuracy against latency.

    A timing that decides nothing is None there, and not drawn.
    """
    return {
        "latency": [
            {"target": row.target, "tower": tower, "p50_ms": _decided(row.timing(tower), "p50_ms")}
            for row in rows
            for tower in row.timings
        ],
        "throughput": [
            {"target": row.target, "batch_size": int(batch), "images_per_s": _decided(timing, "throughput_per_s")}
            for row in rows
            for batch, timing in row.timings.get("vision", {}).items()
        ],
        "accuracy": [
            {
                "target": row.target,
                "vision_p50_ms": _decided(row.timing("vision"), "p50_ms"),
                "top1_percent": row.zero_shot["top1"],
            }
            for row in rows
            if row.zero_shot and row.timings
        ],
        "sensitivity": [
            {
                "target": row.target,
                "share_percent": 100 * point["share"],
                "flips_percent": point["flips"],
                "cosine": point["cosine"],
            }
            for row in rows
            for point in row.search.get("curve", [])
        ],
    }


def _decided(timing: dict[str, Any], key: str) -> float | None:
    return None if timing["undecided"] else timing[key]


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


def doubts(rows: Sequence[Row]) -> list[str]:
    """Why the reference cannot be the model that was meant, chance.doubts: the same in every row that was checked."""
    return next((row.doubts for row in rows if row.doubts), [])


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


def markdown(
    title: str,
    rows: list[Row],
    facts: dict[str, str],
    flows: Sequence[dict[str, Any]] = (),
    sections: Sequence[str] = (),
    shipping: dict[str, Any] | None = None,
    findings: Sequence[dict[str, Any]] = (),
) -> str:
    """The report for a terminal, a pull request or a README."""
    batches = sorted({int(batch) for row in rows for batch in row.timings.get("vision", {})})
    first = batches[0] if batches else 1
    head = [
        "Target",
        "Gate",
        f"Vision p50 ms, batch {first}",
        "Speed-up [95 %]",
        f"Text p50 ms, batch {first}",
        "Speed-up [95 %]",
        "Images/s, best batch",
        "Memory MB",
        "Size MB",
        "Lowest cosine, vision / text",
        "Top-1 %",
        "Drop, points [95 %]",
        "Flips %",
        "Recall@1 %, image to text / text to image",
        "Attention fused",
    ]
    lines = [f"# {title}", "", *(f"**{doubt}.**\n" for doubt in doubts(rows))]
    lines += [*(f"- **{name}**: {value}" for name, value in facts.items()), ""]
    lines += table(head, [_cells(row) for row in rows])
    lines += ["", *_reasons(rows), *_checkpoint_section(findings), *_shipping_section(shipping)]
    lines += ["## Batch sizes", "", *_batch_tables(rows, batches)]
    lines += sections
    lines += _flow_section(flows)
    lines += ["## Graphs", "", *_graph_table(rows), *_pixel_section(rows), *_head_section(rows)]
    lines += _search_section(rows)
    lines += ["## How it was made", "", *_build_table(rows), *HOW]
    return "\n".join(lines).rstrip() + "\n"


HOW = f"""
## How it was measured

- Every row is held against `torch-fp32`, the untouched checkpoint, on the same inputs. Two processes took turns on the
  same cores: speed-up is the median over the turns of the ratio of median latencies, reference over target, with the
  95 % interval of the sign test, which assumes nothing of how the noise is distributed; many turns count in blocks, as
  neighbours in time are alike. Two processes of one program differ for as long as they live, as by where their memory
  lies: `torch-fp32` is timed against itself, and by the furthest from 1 that it came out, intervals here are widened;
  those in `reports/benchmark/` are not.
  On a CPU compare rows by speed-up: latencies of rows that were timed minutes apart carry the machine's drift as well.
  On a GPU compare them by p50, as "Which one to ship" does: there a small batch of the reference waits for Python, and
  its row widens intervals of speed-ups by what it came out at that batch size or a larger one. For the advice, rows
  within {100 * (BETWEEN_RUNS - 1):.0f} % of each other are not told apart there: as much p50
  differed between runs on an H200.
- p90 and p99 (and the p95 of `recommend`) are stated only where at least 5 calls lie beyond them; images/s and texts/s
  are means over all calls. Texts are timed at the model's whole context.
- Both processes keep freed memory (glibc's malloc thresholds are fixed), as a server with a caching allocator does.
- Memory is the peak resident set above an empty interpreter, libraries included, after the smallest batch.
- Drop is the reference's zero-shot top-1 minus the target's, with a paired bootstrap interval; a flip is an image
  whose answer changed. Gates are in conf/gates/. TorchScript and PyTorch's dynamic INT8 are deprecated by PyTorch.
""".splitlines()


def table(head: list[str], body: list[list[str]], left: int = 2) -> list[str]:
    """Lines of a Markdown table; columns behind the first `left` are set flush right."""
    rule = [*("---" for _ in head[:left]), *("---:" for _ in head[left:])]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


def _cells(row: Row) -> list[str]:
    vision, text, zero_shot = row.timing("vision"), row.timing("text"), row.zero_shot
    return [
        f"`{row.target}`",
        row.status if row.status == "pass" else f"**{row.status}**",
        stated(vision, "p50_ms"),
        _speedup(vision),
        stated(text, "p50_ms"),
        _speedup(text),
        stated_throughput(row),
        number(row.memory_mb),
        number(row.size_mb),
        " / ".join(f"{value:.4f}" for value in row.cosine_min.values()) or MISSING,
        _percent(zero_shot.get("top1")),
        _interval(zero_shot, "top1_drop") if row.target != REFERENCE else MISSING,
        _percent(row.flips),
        " / ".join(_percent(row.retrieval[key]) for key in row.retrieval if key.endswith("_r1")) or MISSING,
        row.attention or MISSING,
    ]


def _reasons(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row.status != "pass":
            lines.append(f"- `{row.target}` {row.status}: {'; '.join(row.reasons)}")
            lines += [f"  - {line}" for line in diagnosis_lines(row)]
    if whole := [row for row in rows if row.preprocessed_size]:
        height, width = whole[0].preprocessed_size
        names = ", ".join(f"`{row.target}`" for row in whole)
        lines.append(
            f"- {names}: image latency and speed-up include preprocessing, from uint8 images of {height} x {width} "
            f"pixels; other rows, `{REFERENCE}` among them, start from pixel_values"
        )
    lines += [f"- {note}" for note in timing_notes(rows)]
    return [*lines, ""] if lines else []


def timing_notes(rows: list[Row]) -> list[str]:
    """What ~ marks, why, and one command that times all such rows again."""
    lines = []
    if any(is_waiting(timing) for row in rows for sizes in row.timings.values() for timing in sizes.values()):
        lines.append(f"~ marks speed-ups that decide nothing: {WAITING}")
    if spoiled := [row for row in rows if any(undecided(row.timings))]:
        why = UNSTEADY if spoiled[0].device == "cuda" else BUSY
        names = [row.target for row in spoiled]
        lines.append(
            f"~ marks timings that decide nothing ({', '.join(names)}): {why}; reports/metrics.json leaves them out. "
            f"Time them again on a quiet machine: {again(names)}"
        )
    return lines


def diagnosis_lines(row: Row) -> list[str]:
    """Where a target that missed its gate leaves its FP32 graph, and the command that keeps those nodes in FP32."""
    found = row.diagnosis
    lines = [
        f"{drop['tower']}: against {found['reference']}, cosine falls first in {drop['layer']} "
        f"({drop['cosine_before']:.6f} to {drop['cosine_after']:.6f}, most behind {drop['node']})"
        + (f"; to keep in FP32: {', '.join(drop['nodes'])}" if drop["nodes"] else "")
        for drop in found.get("drops", [])
    ]
    lines += found.get("notes", [])
    if any(drop["nodes"] for drop in found.get("drops", [])):
        lines.append(f"`python -m stages.apply {row.target}` puts these nodes into params.yaml; then `dvc repro`")
    return lines


def _checkpoint_section(findings: Sequence[dict[str, Any]]) -> list[str]:
    """What lint.py found in the checkpoint, and which errors model.allow lets pass."""
    if not findings:
        return []
    body = [
        [f"`{finding['code']}`", _severity(finding), finding["found"], finding["expected"], finding["consequence"]]
        for finding in findings
    ]
    return ["## Checkpoint", "", *table(["Finding", "Severity", "Found", "Expected", "Consequence"], body, left=5), ""]


def _severity(finding: dict[str, Any]) -> str:
    return "**error**, allowed by `model.allow`" if finding["allowed"] else finding["severity"]


def _shipping_section(shipping: dict[str, Any] | None) -> list[str]:
    """What recommend chose, and why each other target lost."""
    if not shipping:
        return []
    lines = ["## Which one to ship", "", *(f"- {fact}" for fact in shipping["facts"]), ""]
    body = [[f"`{target}`", reason] for target, reason in shipping["losers"].items()]
    return [*lines, *(table(["Target", "Why not"], body) if body else []), ""]


def is_waiting(timing: dict[str, Any]) -> bool:
    """Whether a timing's speed-up alone decides nothing, as on a GPU, where the reference waits for Python."""
    return timing["unstable"] and not timing["undecided"]


BUSY = "the machine was busy, so an interval is wide or the reference ran at another speed than beside other rows"
UNSTEADY = "their own calls differ, p90 being far above p50"
WAITING = (
    "small batches of the reference wait for Python, whose speed differs from process to process; "
    'compare rows by p50, as "Which one to ship" does'
)


def _batch_tables(rows: list[Row], batches: list[int]) -> list[str]:
    lines = []
    for tower, unit in (("vision", "images/s"), ("text", "texts/s")):
        head = ["Target", "Quantity", *(f"batch {batch}" for batch in batches)]
        body = []
        for row in rows:
            sizes = [row.timing(tower, str(batch)) for batch in batches]
            if any(sizes):
                body.append([f"`{row.target}`", "p50 / p90 / p99 ms", *(_percentiles(size) for size in sizes)])
                body.append(["", unit, *(stated(size, "throughput_per_s") for size in sizes)])
                body.append(["", "speed-up", *(_speedup(size) for size in sizes)])
        lines += [f"### {tower.capitalize()}", "", *table(head, body), ""]
    return lines


THROUGH_HOST = "the encoder takes no GPU tensors, so pixels go through the host"


def _flow_section(flows: Sequence[dict[str, Any]]) -> list[str]:
    """From JPEG to embedding: one row for each feed of each target."""
    if not flows:
        return []
    head = [
        "Target, feed",
        "Status",
        "Images/s, best batch [slowest, fastest pass]",
        "Best batch",
        "Decode ms",
        "Preprocess ms",
        "Encode ms",
        "Bottleneck",
        "Lowest cosine",
        "Workers",
    ]
    rows = [(flow["target"], feed, row) for flow in flows for feed, row in flow["feeds"].items()]
    lines = ["## From JPEG to embedding", "", *(_flow_facts(flows)), *table(head, [_flow_cells(*row) for row in rows])]
    reasons = [f"- `{target}` {feed} {row['status']}: {row['reason']}" for target, feed, row in rows if "reason" in row]
    reasons += [f"- `{target}` {feed}: {THROUGH_HOST}" for target, feed, row in rows if row.get("through_host")]
    return [*lines, "", *reasons, *([""] if reasons else [])]


def _flow_facts(flows: Sequence[dict[str, Any]]) -> list[str]:
    """What was fed and how, in words; the same for every target that ran."""
    flow = next((flow for flow in flows if "photos" in flow), None)
    if flow is None:
        return []
    photos = flow["photos"]
    return [
        f"{photos['count']} JPEGs of {photos['height']} x {photos['width']} pixels, quality {photos['quality']}, "
        f"{number(photos['kilobytes'])} kB each, from memory. Workers decode and preprocess the next batches while the "
        f"encoder, with {flow['threads']} threads, encodes one. Milliseconds are of one image, each part alone on the "
        "machine, decoding and preprocessing in one worker; where workers and encoder share the cores, the whole can "
        "be slower than its slowest part. The cosine is with what the checkpoint's own processor makes of the files.",
        "",
    ]


def _flow_cells(target: str, feed: str, row: dict[str, Any]) -> list[str]:
    best = row.get("batches", {}).get(str(row.get("best_batch")), {})
    low, high = number(best.get("images_per_s_low")), number(best.get("images_per_s_high"))
    return [
        f"`{target}`, {feed}",
        row["status"] if row["status"] == "measured" else f"**{row['status']}**",
        f"{number(best['images_per_s'])} [{low}, {high}]" if best else MISSING,
        str(row.get("best_batch", MISSING)),
        *(number(best.get(f"{part}_ms")) for part in ("decode", "preprocess", "encode")),
        best.get("bottleneck", MISSING),
        f"{row['cosine_min']:.4f}" if "cosine_min" in row else MISSING,
        str(row.get("workers", MISSING)),
    ]


def _graph_table(rows: list[Row]) -> list[str]:
    head = [
        "Graph",
        "Operator sets",
        "Nodes",
        "Attention fused",
        "SkipLayerNorm",
        "GELU",
        "Inputs and outputs",
        "IR, producer",
    ]
    body = []
    for row in rows:
        for tower, graph in row.graphs.items():
            fusion = graph["fusion"]
            shapes = [f"{name} {shape}" for name, shape in {**graph["inputs"], **graph["outputs"]}.items()]
            body.append(
                [
                    f"`{row.target}` {tower}",
                    ", ".join(f"{domain} {version}" for domain, version in graph["opsets"].items()),
                    str(graph["nodes"]),
                    f"{fusion['attention']}/{fusion['attention_expected']}",
                    str(fusion["skip_layer_norm"]),
                    str(fusion["gelu"]),
                    ", ".join(shapes).replace("'", ""),
                    f"{graph['ir_version']}, {graph['producer']}",
                ]
            )
    return [*table(head, body), ""] if body else ["No ONNX target.", ""]


def _pixel_section(rows: list[Row]) -> list[str]:
    """How the preprocessing inside the graphs compares with the checkpoint's processor."""
    head = ["Target", "Largest difference", "Mean difference", "Pixels that differ"]
    body = [
        [
            f"`{row.target}`",
            number(row.pixels["max_diff"]),
            number(row.pixels["mean_diff"]),
            f"{row.pixels['differing_percent']:.3f} %",
        ]
        for row in rows
        if row.pixels
    ]
    if not body:
        return []
    title = "## Preprocessing inside the graph, against the checkpoint's processor (in 1/255, before normalisation)"
    return [title, "", *table(head, body), ""]


def _head_section(rows: list[Row]) -> list[str]:
    """Whether zero-shot heads answer as the untouched model does."""
    head = ["Target", "Images to which the zero-shot head gives the untouched model's label"]
    body = [
        [
            f"`{row.target}`",
            row.classifier.get("unchecked")
            or f"{row.classifier['agreement_percent']:.2f} % ({row.classifier['labels']} labels)",
        ]
        for row in rows
        if row.classifier
    ]
    return ["## Zero-shot heads", "", *table(head, body), ""] if body else []


def _search_section(rows: list[Row]) -> list[str]:
    """What INT8 costs node by node, and what stays in float for it."""
    searched = [row for row in rows if row.search]
    if not searched:
        return []
    head = [
        "Target",
        "Left in float",
        "Calibration set: drop, flips",
        "Most sensitive: 1 - cosine where it alone is INT8",
    ]
    body, curves = [], []
    for row in searched:
        found = row.search
        left = f"{len(found['left_in_float'])} of {found['nodes']}"
        names = f": {', '.join(found['left_in_float'])}" if found["left_in_float"] else ""
        worst = [f"{name} {value:.1e}" for name, value in list(found["sensitivity"].items())[:MOST_SENSITIVE]]
        cost = f"{found['top1_drop']:.2f} points, {found['flips']:.2f} %"
        body.append([f"`{row.target}`", left + names, cost, ", ".join(worst)])
        points = [
            f"{100 * point['share']:.0f} %: {point['flips']:.2f} % ({point['cosine']:.5f})" for point in found["curve"]
        ]
        curves.append([f"`{row.target}`", ", ".join(points)])
    lines = ["## INT8 within its accuracy budget", "", *table(head, body), ""]
    return [
        *lines,
        *table(["Target", "Share of nodes in INT8: answers that flip (mean cosine), on the calibration set"], curves),
        "",
    ]


def _build_table(rows: list[Row]) -> list[str]:
    def plain(row: Row) -> str:
        return "the checkpoint as it came" if row.target == REFERENCE else MISSING

    return table(["Target", "Build"], [[f"`{row.target}`", row.build or plain(row)] for row in rows])


def number(value: float | None) -> str:
    """Three significant digits, never in scientific notation."""
    if value is None:
        return MISSING
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:,.{max(decimals, 0)}f}"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def stated(timing: dict[str, Any], key: str) -> str:
    """A number of a timing, with ~ in front where it decides nothing."""
    return _mark(timing.get("undecided")) + number(timing.get(key))


def stated_throughput(row: Row) -> str:
    """Images per second at the best batch size, with ~ where one of its timings decides nothing."""
    return _mark(row.is_undecided("vision")) + number(best_throughput(row, "vision"))


def _mark(is_undecided: bool | None) -> str:
    return "~ " if is_undecided else ""


def _speedup(timing: dict[str, Any]) -> str:
    if not timing:
        return MISSING
    mark, interval = _mark(timing["unstable"]), f"[{timing['speedup_low']:.2f}, {timing['speedup_high']:.2f}]"
    return f"{mark}{timing['speedup']:.2f}x {interval}"


def _interval(record: dict[str, float], key: str) -> str:
    if key not in record:
        return MISSING
    return f"{record[key]:.2f} [{record[f'{key}_low']:.2f}, {record[f'{key}_high']:.2f}]"


def _percentiles(timing: dict[str, Any]) -> str:
    found = " / ".join(number(timing.get(f"p{q}_ms")) for q in (50, 90, 99))
    return _mark(timing["undecided"]) + found if timing else MISSING


def page(
    title: str,
    rows: list[Row],
    facts: dict[str, str],
    flows: Sequence[dict[str, Any]] = (),
    shipping: dict[str, Any] | None = None,
    findings: Sequence[dict[str, Any]] = (),
    sections: Sequence[str] = (),
) -> str:
    """The report as one self-contained HTML page: no request leaves it; `sections` are lines of Markdown."""
    content = {
        "title": title,
        "doubts": doubts(rows),
        "facts": facts,
        "rows": [
            rounded({**asdict(row), "images_per_s": best_throughput(row, "vision"), "diagnosis": diagnosis_lines(row)})
            for row in rows
        ],
        "notes": timing_notes(rows),
        "flows": rounded(flows),
        "flow_facts": "".join(_flow_facts(flows)),
        "shipping": shipping or {"facts": [], "losers": {}, "front": []},
        "findings": list(findings),
    }
    data = json.dumps(content).replace("<", "\\u003c")  # no row may close the script
    return PAGE.read_text(encoding="utf-8").replace("__SECTIONS__", _rendered(sections)).replace("__CONTENT__", data)


def _rendered(sections: Sequence[str]) -> str:
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render("\n".join(sections))
    return html.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
