"""The sections of the report, in their order; each has both faces, report.md and report.html."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.config import REFERENCE
from clip_deploy.core.fusions import ADVICE, KINDS
from clip_deploy.core.model import Finding
from clip_deploy.core.records import EndToEnd, FeedTiming, Limit, Recall, StoredVectors
from clip_deploy.report.contents import Block, Key, Report, Section, Table
from clip_deploy.report.decisive import BETWEEN_RUNS, Judged, again, pace, undecided
from clip_deploy.report.figures import accuracy_figure, sensitivity_figure, speed_figure, throughput_figure
from clip_deploy.report.gpu_sections import gpu_duels, gpu_queued, gpu_tutorial, gpu_usage
from clip_deploy.report.recommend import Shipping
from clip_deploy.report.rows import Row, best_throughput
from clip_deploy.report.serving_section import serving_section
from clip_deploy.report.tables import (
    MISSING,
    _drop,
    _percent,
    _percentiles,
    bullets,
    number,
    speedup_cell,
    stated,
    stated_throughput,
)
from clip_deploy.report.triton_sections import triton_section

SENSITIVE_SHOWN = 5  # nodes named in the report; all are in reports/validate/


def sections(report: Report) -> list[Section]:
    """Those that this run has something for."""
    return [section for build in SECTIONS if (section := build(report))]


def shipping_section(report: Report) -> Section | None:
    """What recommend chose, what is faster and why it is not chosen, and why each other target lost."""
    shipping = report.shipping
    if not shipping:
        return None
    facts = [*shipping.facts, fastest_fact(report.rows, shipping)]
    lost = _grouped(shipping.losers.items())
    blocks: list[Block] = [bullets(facts)]
    head = ["Target", f"Why not (times at batch {shipping.batch})"]
    return Section("Which one to ship", [*blocks, *([Table(head, lost)] if lost else [])])


def fastest_fact(rows: list[Row], shipping: Shipping) -> str:
    """The fastest row of each tower, and the word why where it is not the one to ship."""
    best = fastest(rows, shipping.batch)
    named = [f"{row.target} ({tower}, {_measure(row, tower, shipping.batch)})" for tower, row in best.items()]
    others = dict.fromkeys(row.target for tower, row in best.items() if row.target != shipping.ship.get(tower))
    why = [f"{name} is not the one to ship: {_why(name, shipping)}" for name in others]
    return "; ".join([f"Fastest that passes its gate: {', '.join(named) or 'none'}", *why]) + "."


def _why(target: str, shipping: Shipping) -> str:
    return shipping.losers.get(target) or "it ships for the other tower alone"


def fastest(rows: list[Row], batch: int) -> dict[str, Row]:
    """By tower the row that passes its gate and takes least, among the timings that decide; on a GPU those there."""
    found = {}
    for tower in TOWERS:
        passed = [row for row in rows if row.status == "pass"]
        steady = [(row, timing) for row in passed if (timing := row.timing(tower, batch)) and not timing.undecided]
        compared = [(row, timing) for row, timing in steady if row.device == "cuda"] or steady
        if compared:
            found[tower] = min(compared, key=lambda each: pace(each[1], each[0].device == "cuda").middle)[0]
    return found


def _measure(row: Row, tower: str, batch: int) -> str:
    timing = row.timing(tower, batch)
    return f"{number(timing.p50_ms)} ms" if timing and row.device == "cuda" else speedup_cell(timing)


@dataclass(frozen=True)
class Column:
    """One of the table of targets: what a cell shows and what it is sorted by."""

    head: str
    shown: Callable[[Row], str]
    key: Callable[[Row], Key]


def target_section(report: Report) -> Section:
    """The table of all targets."""
    rows, columns = report.rows, _columns(report.rows)
    absent = [row for row in rows if row.status == "unavailable"]
    table = Table(
        head=[column.head for column in columns],
        body=[[column.shown(row) for column in columns] for row in rows],
        keys=[[column.key(row) for column in columns] for row in rows],
        folded=[place for place, row in enumerate(rows) if row in absent],
        folded_as=_absent((f"`{row.target}`", "; ".join(row.reasons)) for row in absent),
    )
    about = bullets(f"**{name}**: {value}" for name, value in report.about.items())
    notes = bullets([*_itself(rows), *_reasons(rows)])
    front, ship = (report.shipping.front, report.shipping.ship.values()) if report.shipping else ([], [])
    figures = [accuracy_figure(rows, front, ship), speed_figure(rows)]
    return Section("Targets", [block for block in (about, table, notes, *_gates(rows), *figures) if block])


GATES = {  # what the table of gates calls each limit
    "min_cosine": "Lowest cosine, at least",
    "max_top1_drop": "Top-1 drop, points, at most",
    "max_flips": "Flips %, at most",
}


def _gates(rows: list[Row]) -> list[Block]:
    """What each precision class must keep, and where that is set."""
    found = {row.precision: row.limits for row in rows if row.limits}
    body = [[f"`{name}`", *(_limit(limits.get(key)) for key in GATES)] for name, limits in found.items()]
    said = (
        f"What a target must keep to pass, by its precision, beside `{REFERENCE}`. The limits are set in conf/gates/, "
        "in the file that `gates` in params.yaml names."
    )
    return [said, Table(["Gate", *GATES.values()], body, left=1)] if body else []


def _limit(found: Limit | None) -> str:
    if found is None:
        return MISSING
    return f"{found.limit:g}" + (f" (not applied: {found.unchecked})" if found.unchecked else "")


def _itself(rows: list[Row]) -> list[str]:
    """What the reference's own speed-up is."""
    if not any(row.target == REFERENCE and row.timings for row in rows):
        return []
    return [
        f"`{REFERENCE}`'s speed-up is over itself, the reference timed once more beside the reference: how far it lies "
        "from 1 is noise, and every interval here is widened by it"
    ]


def _columns(rows: list[Row]) -> list[Column]:
    first = min((batch for row in rows for batch in row.timings.get("vision", {})), default=1)
    on_gpu = [
        Column("GPU memory MB", lambda row: number(row.gpu_memory_mb), lambda row: row.gpu_memory_mb),
        Column("J per 1,000 images", lambda row: number(_energy(row)), _energy),
    ]
    return [
        Column("Target", lambda row: f"`{row.target}`", lambda row: row.target),
        Column("Precision", lambda row: row.precision or MISSING, lambda row: row.precision),
        Column("Gate", lambda row: row.status if row.status == "pass" else f"**{row.status}**", lambda row: row.status),
        *_timing_columns("vision", first),
        *_timing_columns("text", first),
        Column("Images/s, best batch", stated_throughput, _throughput),
        Column("Memory MB", lambda row: number(row.memory_mb), lambda row: row.memory_mb),
        *(on_gpu if any(row.device == "cuda" for row in rows) else []),
        Column("Size MB", lambda row: number(row.size_mb), lambda row: row.size_mb),
        Column("Lowest cosine, vision / text", _cosines, lambda row: min(row.cosine_min.values(), default=None)),
        Column("Top-1 %", lambda row: _percent(_top1(row)), _top1),
        Column("Drop, points [95 %]", _shown_drop, _top1_drop),
        Column("Flips %", lambda row: _percent(row.flips), lambda row: row.flips),
        Column(
            "Recall@1 %, image to text / text to image",
            _recalls,
            lambda row: row.retrieval.image_to_text_r1 if row.retrieval else None,
        ),
        Column("Attention fused", lambda row: row.attention or MISSING, lambda row: row.attention or None),
    ]


def _timing_columns(tower: str, batch: int) -> list[Column]:
    return [
        Column(
            f"{tower.capitalize()} p50 ms, batch {batch}",
            lambda row: stated(row.timing(tower), "p50_ms"),
            lambda row: _decided(row, tower, "p50_ms", "undecided"),
        ),
        Column(
            f"{tower.capitalize()} speed-up [95 %]",
            lambda row: speedup_cell(row.timing(tower)),
            lambda row: _decided(row, tower, "speedup", "unstable"),
        ),
    ]


def _energy(row: Row) -> float | None:
    return row.power.j_per_1000_images if row.power else None


def _top1(row: Row) -> float | None:
    return row.zero_shot.top1 if row.zero_shot else None


def _top1_drop(row: Row) -> float | None:
    return row.zero_shot.top1_drop if row.zero_shot else None


def _recalls(row: Row) -> str:
    found = row.retrieval
    return f"{_percent(found.image_to_text_r1)} / {_percent(found.text_to_image_r1)}" if found else MISSING


def _decided(row: Row, tower: str, key: str, mark: str) -> Key:
    """A number of the smallest batch's timing; None where the mark says that it decides nothing."""
    timing = row.timing(tower)
    found: Key = None if timing is None or getattr(timing, mark) else getattr(timing, key)
    return found


def _throughput(row: Row) -> Key:
    return None if row.is_undecided("vision") else best_throughput(row, "vision")


def _cosines(row: Row) -> str:
    return " / ".join(f"{value:.4f}" for value in row.cosine_min.values()) or MISSING


def _shown_drop(row: Row) -> str:
    return MISSING if row.target == REFERENCE else _drop(row.zero_shot)


def _reasons(rows: list[Row]) -> list[str]:
    """What missed its gate and where, what is timed otherwise, and what ~ marks; a line of Markdown each."""
    lines = []
    for row in rows:
        if row.status == "fail":
            lines.append(f"`{row.target}` {row.status}: {'; '.join(row.reasons)}")
            lines[-1] += "".join(f"\n  - {line}" for line in diagnosis_lines(row))
    if whole := [row for row in rows if row.preprocessed_size]:
        height, width = whole[0].preprocessed_size
        names = ", ".join(f"`{row.target}`" for row in whole)
        lines.append(
            f"{names}: image latency and speed-up include preprocessing, from uint8 images of {height} x {width} "
            f"pixels; other rows, `{REFERENCE}` among them, start from pixel_values"
        )
    return [*lines, *timing_notes(rows)]


def _absent(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each reason, with all that is missing for it."""
    return [f"{names} unavailable: {reason}" for names, reason in _grouped(reasons, "")]


def _grouped(reasons: Iterable[tuple[str, str]], mark: str = "`") -> list[list[str]]:
    """Names that share a reason, and the reason."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons:
        found[reason].append(f"{mark}{name}{mark}")
    return [[", ".join(names), reason] for reason, names in found.items()]


def timing_notes(rows: list[Row]) -> list[str]:
    """What ~ marks, why, and one command that times all such rows again."""
    lines = []
    if any(is_waiting(timing) for row in rows for sizes in row.timings.values() for timing in sizes.values()):
        lines.append(f"~ marks speed-ups that decide nothing: {WAITING}")
    if spoiled := [row for row in rows if any(undecided(row.timings))]:
        why = UNSTEADY if spoiled[0].device == "cuda" else BUSY
        names = [row.target for row in spoiled]
        lines.append(
            f"~ marks timings that decide nothing ({', '.join(names)}): {why}; reports/targets.json leaves them out. "
            f"Time them again on a quiet machine: {again(names)}"
        )
    return lines


def diagnosis_lines(row: Row) -> list[str]:
    """Where a target that missed its gate leaves its FP32 graph, and the command that keeps those nodes in FP32."""
    found = row.diagnosis
    if found is None:
        return []
    lines = [
        f"{drop.tower}: against {found.reference}, cosine falls first in {drop.layer} "
        f"({drop.cosine_before:.6f} to {drop.cosine_after:.6f}, most behind {drop.node})"
        + (f"; to keep in FP32: {', '.join(drop.nodes)}" if drop.nodes else "")
        for drop in found.drops
    ]
    lines += found.notes
    if any(drop.nodes for drop in found.drops):
        lines.append(f"`clip-deploy apply {row.target}` puts these nodes into params.yaml; then `dvc repro`")
    return lines


def checkpoint_section(report: Report) -> Section | None:
    """What the checkpoint's check found, and which errors model.allow lets pass."""
    body = [
        [f"`{finding.code}`", _severity(finding), finding.found, finding.expected, finding.consequence]
        for finding in report.findings
    ]
    head = ["Finding", "Severity", "Found", "Expected", "Consequence"]
    return Section("Checkpoint", [Table(head, body, left=5)]) if body else None


def _severity(finding: Finding) -> str:
    return "**error**, allowed by `model.allow`" if finding.allowed else finding.severity


def is_waiting(timing: Judged) -> bool:
    """Whether a timing's speed-up alone decides nothing, as on a GPU, where the reference waits for Python."""
    return timing.unstable and not timing.undecided


BUSY = "the machine was busy, so an interval is wide or the reference ran at another speed than beside other rows"
UNSTEADY = "their own calls differ, p90 being far above p50"
WAITING = (
    "small batches of the reference wait for Python, whose speed differs from process to process; "
    'compare rows by p50, as "Which one to ship" does'
)


def batch_section(report: Report) -> Section:
    """Percentiles, throughput and speed-up at every batch size."""
    blocks: list[Block] = []
    for tower, unit in (("vision", "images/s"), ("text", "texts/s")):
        if any(row.timings.get(tower) for row in report.rows):
            blocks += [f"### {tower.capitalize()}", _batch_table(report.rows, tower, unit)]
    figure = throughput_figure(report.rows)
    return Section("Batch sizes", [*blocks, *([figure] if figure else [])] or ["No target was timed."])


def _batch_table(rows: list[Row], tower: str, unit: str) -> Table:
    batches = sorted({batch for row in rows for batch in row.timings.get(tower, {})})
    body = []
    for row in rows:
        sizes = [row.timing(tower, batch) for batch in batches]
        if any(sizes):
            body.append([f"`{row.target}`", "p50 / p90 / p99 ms", *(_percentiles(size) for size in sizes)])
            body.append(["", unit, *(stated(size, "throughput_per_s") for size in sizes)])
            body.append(["", "speed-up", *(speedup_cell(size) for size in sizes)])
    return Table(["Target", "Quantity", *(f"batch {batch}" for batch in batches)], body)


THROUGH_HOST = "the encoder takes no GPU tensors, so pixels go through the host"


def flow_section(report: Report) -> Section | None:
    """From JPEG to embedding: one row for each feed of each target."""
    flows = report.flows
    if not flows:
        return None
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
        "Top-1 drop, points",
        "Flips %",
        "Workers",
    ]
    rows = [(target, feed, row) for target, flow in flows.items() for feed, row in flow.feeds.items()]
    absent = [found for found in rows if found[2].status == "unavailable"]
    table = Table(
        head,
        [_flow_cells(*found) for found in rows],
        folded=[place for place, found in enumerate(rows) if found in absent],
        folded_as=_absent((f"`{target}` {feed}", row.reason or "") for target, feed, row in absent),
    )
    present = [found for found in rows if found not in absent]
    notes = [f"`{target}` {feed} {row.status}: {row.reason}" for target, feed, row in present if row.reason]
    notes += [f"`{target}` {feed}: {THROUGH_HOST}" for target, feed, row in rows if row.through_host]
    return Section("From JPEG to embedding", [*_flow_facts(flows), table, *([bullets(notes)] if notes else [])])


def _flow_facts(flows: Mapping[str, EndToEnd]) -> list[Block]:
    """What was fed and how; the same for every target that ran."""
    flow = next((flow for flow in flows.values() if flow.photos), None)
    if flow is None or flow.photos is None:
        return []
    photos = flow.photos
    return [
        f"{photos.count} JPEGs of {photos.height} x {photos.width} pixels, quality {photos.quality}, "
        f"{number(photos.kilobytes)} kB each, from memory. Workers decode and preprocess the next batches while the "
        f"encoder, with {flow.threads} threads, encodes one. Milliseconds are of one image, each part alone on the "
        "machine, decoding and preprocessing in one worker; where workers and encoder share the cores, the whole can "
        "be slower than its slowest part. The bottleneck is encoding where that takes half of an image's time in the "
        "flow or more, else the longer of the other two. Cosine, top-1 and flips are against what the checkpoint's "
        "own processor makes of the files; a feed that costs more than its target's gate allows is marked.",
    ]


def _flow_cells(target: str, feed: str, row: FeedTiming) -> list[str]:
    name = f"`{target}`, {feed}"
    best = row.best
    if best is None:
        return [name, f"**{row.status}**", *[MISSING] * 10]
    return [
        name,
        row.status if row.status == "measured" else f"**{row.status}**",
        f"{number(best.images_per_s)} [{number(best.images_per_s_low)}, {number(best.images_per_s_high)}]",
        str(row.best_batch),
        *(number(part) for part in (best.decode_ms, best.preprocess_ms, best.encode_ms)),
        best.bottleneck,
        f"{row.cosine_min:.4f}",
        *(MISSING if value is None else f"{value:.1f}" for value in (row.top1_drop, row.flips)),
        str(row.workers),
    ]


def graph_section(report: Report) -> Section:
    """What is in each ONNX graph, and what was fused there."""
    head = [
        "Graph",
        "Operator sets",
        "Nodes",
        "Attention fused",
        "Inputs and outputs",
        "IR, producer",
    ]
    body = []
    for row in report.rows:
        for tower, graph in row.graphs.items():
            fusion = graph.fusion
            shapes = [f"{name} {shape}" for name, shape in {**graph.inputs, **graph.outputs}.items()]
            body.append(
                [
                    f"`{row.target}` {tower}",
                    ", ".join(f"{domain} {version}" for domain, version in graph.opsets.items()),
                    str(graph.nodes),
                    f"{fusion['attention']}/{fusion['attention_expected']}",
                    ", ".join(shapes).replace("'", ""),
                    f"{graph.ir_version}, {graph.producer}",
                ]
            )
    return Section("Graphs", [Table(head, body, left=len(head)) if body else "No ONNX target."])


def fusion_section(report: Report) -> Section | None:
    """What each target's fusions found of what its model computes; what they missed in bold."""
    towers = [(row, tower, kinds) for row in report.rows for tower, kinds in row.fusions.items()]
    shown = [kind for kind in KINDS if any(max(kinds.get(kind, [0])) for _, _, kinds in towers)]
    body = [[f"`{row.target}` {tower}", *(_fused(kinds.get(kind)) for kind in shown)] for row, tower, kinds in towers]
    head = ["Fused, of those in the model", *(KINDS[kind] for kind in shown)]
    return Section("Fusions", [Table(head, body, left=1), FUSIONS]) if body else None


FUSIONS = (
    "Expected is what the PyTorch model computes in one call, counted when it was exported. "
    f"Where fewer are fused, {ADVICE}; `fusions: true` in conf/gates/ makes it a failure."
)


def _fused(numbers: list[int] | None) -> str:
    """Found of expected; nothing where the target does not ask for it or the model has none."""
    if not numbers or not max(numbers):
        return MISSING
    found, expected = numbers
    return f"{found}/{expected}" if found >= expected else f"**{found}/{expected}**"


def pixel_section(report: Report) -> Section | None:
    """How the preprocessing inside the graphs compares with the checkpoint's processor."""
    head = ["Target", "Largest difference", "Mean difference", "Pixels that differ"]
    body = [
        [
            f"`{row.target}`",
            number(row.pixels.max_diff),
            number(row.pixels.mean_diff),
            f"{row.pixels.differing_percent:.3f} %",
        ]
        for row in report.rows
        if row.pixels
    ]
    title = "Preprocessing inside the graph, against the checkpoint's processor (in 1/255, before normalisation)"
    return Section(title, [Table(head, body)]) if body else None


def head_section(report: Report) -> Section | None:
    """Whether zero-shot heads answer as the untouched model does."""
    head = ["Target", "Images to which the zero-shot head gives the untouched model's label"]
    body = [
        [
            f"`{row.target}`",
            row.classifier.unchecked or f"{row.classifier.agreement_percent:.2f} % ({row.classifier.labels} labels)",
        ]
        for row in report.rows
        if row.classifier
    ]
    return Section("Zero-shot heads", [Table(head, body)]) if body else None


def search_section(report: Report) -> Section | None:
    """What quantisation costs node by node, and what is left out for it."""
    searched = [(row, row.search) for row in report.rows if row.search]
    if not searched:
        return None
    head = [
        "Target",
        "Not quantised",
        "Calibration set: drop, flips",
        "Most sensitive: 1 - cosine where it alone is quantised",
    ]
    body, curves = [], []
    for row, found in searched:
        left = f"{len(found.left_in_float)} of {found.nodes}"
        names = f": {', '.join(found.left_in_float)}" if found.left_in_float else ""
        worst = [f"{name} {value:.1e}" for name, value in list(found.sensitivity.items())[:SENSITIVE_SHOWN]]
        cost = f"{found.top1_drop:.2f} points, {found.flips:.2f} %"
        body.append([f"`{row.target}`", left + names, cost, ", ".join(worst)])
        points = [
            f"{100 * point.share:.0f} %: {point.top1_drop:.2f} points, {point.flips:.2f} % ({point.cosine:.5f})"
            for point in found.curve
        ]
        curves.append([f"`{row.target}`", "; ".join(points)])
    shares = ["Target", "Share of nodes quantised: drop, flips (mean cosine), on the calibration set"]
    figure = sensitivity_figure(searched)
    tables: list[Block] = [Table(head, body, left=4), Table(shares, curves)]
    return Section("Quantised within an accuracy budget", [*tables, *([figure] if figure else [])])


def vector_section(report: Report) -> Section | None:
    """What fewer dimensions and fewer bits of each cost a search by text."""
    found = report.vectors
    if not found:
        return None
    nearest = list(dict.fromkeys(k for cost in found.costs for k in cost.recall))
    head = ["Dimensions", "Type", "Bytes of a vector", *(f"Recall@{k} % [95 %]" for k in nearest)]
    body = [
        [str(cost.dimensions), cost.dtype, f"{cost.bytes:,}", *(_recall(cost.recall[k]) for k in nearest)]
        for cost in found.costs
    ]
    left_out = [bullets(f"Left out: {reason}." for reason in found.left_out)] if found.left_out else []
    random = [] if all(row.trained for row in report.rows) else [RANDOM]
    return Section("Shorter vectors", [*random, Table(head, body), *left_out, _vectors_measure(found)])


RANDOM = (
    "**The weights are random**: a trained model's vectors lie otherwise, so this says nothing of what it would lose."
)


def _recall(found: Recall) -> str:
    return f"{found.percent:.1f} [{found.low:.1f}, {found.high:.1f}]"


def _vectors_measure(found: StoredVectors) -> str:
    return (
        f"{found.queries:,} {found.of} of different words search the {found.images:,} images of the evaluation set, "
        f"all embedded by `{REFERENCE}`. Recall@k is the share of the k nearest images by float32 at "
        f"{found.dimension:,} dimensions that are among the k nearest by the vectors of that row, averaged over the "
        "queries, with a bootstrap interval over them. The text is cut like the images and stays float32, as in "
        "`clip-deploy search`. An image that ties with the k-th nearest counts as near; shorter vectors that tie for "
        "the last places share them."
    )


def build_section(report: Report) -> Section:
    """How each target that is there was made."""
    body = [[f"`{row.target}`", row.build or _plain(row)] for row in report.rows if row.status != "unavailable"]
    return Section("How it was made", [Table(["Target", "Build"], body)])


def _plain(row: Row) -> str:
    return "the checkpoint as it came" if row.target == REFERENCE else MISSING


def method_section(report: Report) -> Section:
    """What the numbers mean, which is the same in every report."""
    return Section("How it was measured", [HOW])


def run_section(report: Report) -> Section | None:
    """The machine and the versions."""
    lines = bullets(f"**{name}**: {value}" for name, value in report.run.items())
    return Section("Machine and versions", [lines]) if lines else None


HOW = f"""\
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
  whose answer changed. An interval of [0.00, 0.00] says that no image of the evaluation set was lost or gained, not
  that none can be: of n images, a drop of up to 300 / n points would go unseen (95 %).
- Gates are in conf/gates/. TorchScript and PyTorch's dynamic INT8 are deprecated by PyTorch.\
"""

SECTIONS: Sequence[Callable[[Report], Section | None]] = (
    shipping_section,
    target_section,
    checkpoint_section,
    flow_section,
    batch_section,
    gpu_usage,
    gpu_queued,
    gpu_duels,
    gpu_tutorial,
    serving_section,
    triton_section,
    graph_section,
    fusion_section,
    pixel_section,
    head_section,
    search_section,
    vector_section,
    build_section,
    method_section,
    run_section,
)
