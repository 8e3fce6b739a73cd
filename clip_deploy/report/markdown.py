"""The report: one row a target, from what validate and benchmark wrote, as a table, a page, metrics and plots."""

from collections.abc import Sequence
from typing import Any

from clip_deploy.core.config import REFERENCE
from clip_deploy.report.decisive import BETWEEN_RUNS, again, undecided
from clip_deploy.report.rows import Row, doubts
from clip_deploy.report.tables import (
    MISSING,
    _interval,
    _percent,
    _percentiles,
    _speedup,
    number,
    stated,
    stated_throughput,
    table,
)

MOST_SENSITIVE = 5  # nodes named in the report; all are in reports/validate/


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
        lines.append(f"`clip-deploy apply {row.target}` puts these nodes into params.yaml; then `dvc repro`")
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
