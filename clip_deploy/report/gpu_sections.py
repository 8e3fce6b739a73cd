"""The report's sections on a GPU: memory, power, where each node ran; and the table of the tutorial on CLIP there."""

from itertools import product
from statistics import median

from clip_deploy.report.contents import Report, Section, Table
from clip_deploy.report.decisive import Judged
from clip_deploy.report.rows import Row
from clip_deploy.report.tables import MISSING, number, stated, stated_throughput

# Latency in ms and GPU memory in GB at batch 1, as the tutorial that this project grew out of printed them for an RTX
# 3090; it does not say which tower, which batch of texts or what of the way there and back it timed.
TUTORIAL = {
    "PyTorch FP32": ("torch-fp32", 20, 2.5),
    "PyTorch FP16": ("torch-fp16", 12, 1.3),
    "TorchScript": ("torchscript-fp16", 18, 2.5),
    "ONNX Runtime": ("ort-cuda-fp32", 15, 2.0),
    "ONNX and TensorRT": ("trt-fp16", 8, 1.5),
}
COMPILERS = ("torch-compile-", "trt-", "ort-trt-")  # what a user would reach for first
LOSSY = {"fp8", "int8"}  # of less work than FP16: set against itself alone
OURS = ("torch-fused-", "aoti-", "ort-cuda-")  # our own fused graphs
TIMED = (
    "Timed: one call on inputs that lie on the GPU already, until the GPU has done its work, by the host's clock; the "
    "way there and back, decoding and preprocessing are not in it."
)


def gpu_usage(report: Report) -> Section | None:
    """Memory, power and the provider of every node, of the rows that ran on a GPU."""
    said = TIMED + " Power is the whole GPU's while images are encoded without a pause at the named batch size."
    return Section("On the GPU", [said, _usage(ran)]) if (ran := _ran(report)) else None


def gpu_queued(report: Report) -> Section | None:
    """A call with a wait behind it, beside calls that are asked for without one."""
    if not (rows := [row for row in _ran(report) if any(_queued(row))]):
        return None
    said = (
        "Milliseconds of a call: with a wait for the GPU after each (p50, as all other tables have it) / of calls that "
        "are asked for back to back, with one wait at the end: take the first for one request at a time, the second "
        "for a queue that is never empty. Small batches differ by what a launch takes. Where the second takes longer, "
        "a load without pauses lowered the GPU's clock, or the row waits for Python, whose speed varies."
    )
    sizes = [(tower, batch) for tower, batches in rows[0].timings.items() for batch in batches]
    head = ["Target", *(f"{tower} @{batch}" for tower, batch in sizes)]
    body = [[f"`{row.target}`", *(_both_ways(row.timing(*size)) for size in sizes)] for row in rows]
    return Section("Single calls and back to back", [said, Table(head, body)])


def _queued(row: Row) -> list[float | None]:
    return [timing.queued_ms for sizes in row.timings.values() for timing in sizes.values()]


def _both_ways(timing: Judged | None) -> str:
    return f"{number(timing.p50_ms)} / {number(timing.queued_ms)}" if timing else MISSING


def gpu_duels(report: Report) -> Section | None:
    """Our fastest row beside the compilers', for each tower and batch size."""
    if not (ran := _ran(report)):
        return None
    rows = [row for row in ran if row.status == "pass"]
    peers = {row.precision for row in rows if row.target.startswith(COMPILERS)}
    alone = {row.precision for row in rows} & LOSSY - peers
    said = [
        "The fastest row of each side that passes its gate, by p50 in this run.",
        *(f"Rows in {name.upper()} are left out: no compiler's row has it." for name in sorted(alone)),
        *_matrix_rate(ran),
    ]
    compared = [row for row in rows if row.precision not in alone]
    return Section("Our graphs, torch.compile and TensorRT", [" ".join(said), _duels(compared)])


def gpu_tutorial(report: Report) -> Section | None:
    """What the tutorial printed, beside what was measured here."""
    said = (
        "Latency at batch 1, beside what the tutorial printed for an RTX 3090 (another GPU, other weights, and what it "
        "timed is not said): compare the order of the forms, not the milliseconds."
    )
    rows = {row.target: row for row in report.rows}
    return Section("The tutorial's table", [said, _tutorial(rows)]) if _ran(report) else None


def _ran(report: Report) -> list[Row]:
    return [row for row in report.rows if row.device == "cuda" and row.timings]


def _usage(rows: list[Row]) -> Table:
    head = [
        "Target",
        "Nodes by provider",
        "CUDA graph",
        "GPU memory MB",
        "Mean W (batch)",
        "J per 1,000 images",
        "Clock MHz, before / after",
    ]
    return Table(head, [_usage_cells(row) for row in rows])


def _usage_cells(row: Row) -> list[str]:
    power = row.power
    clocks = " / ".join(map(number, power.clock_mhz if power else []))
    return [
        f"`{row.target}`",
        "; ".join(f"{tower} {_nodes(placed.nodes)}" for tower, placed in row.placement.items()) or MISSING,
        ", ".join(f"{tower} {'yes' if placed.graph else 'no'}" for tower, placed in row.placement.items()) or MISSING,
        number(row.gpu_memory_mb),
        f"{number(power.mean_w)} ({power.batch})" if power else MISSING,
        number(power.j_per_1000_images if power else None),
        clocks or MISSING,
    ]


def _nodes(counts: dict[str, int]) -> str:
    """How many nodes each provider runs; the CPU's are marked."""
    named = {name.removesuffix("ExecutionProvider"): count for name, count in counts.items()}
    return ", ".join(f"**{count} CPU**" if name == "CPU" else f"{count} {name}" for name, count in named.items())


def _matrix_rate(rows: list[Row]) -> list[str]:
    rates = [row.matrix_tflops for row in rows if row.matrix_tflops]
    if not rates:
        return []
    return [
        f"FP16 matmuls of 8,192 x 8,192 matrices ran at {number(median(rates))} TFLOP/s here (median of the rows); "
        "the share of that is of the untouched model's work, whatever a target leaves out."
    ]


def _duels(rows: list[Row]) -> Table:
    """Ours against the compilers', for each tower and batch size."""
    head = ["Tower", "Batch", "Ours", "ms", "torch.compile or TensorRT", "ms", "Ratio", "Ours, share of FP16 rate"]
    body = []
    sizes = sorted({batch for row in rows for timed in row.timings.values() for batch in timed})
    for tower, batch in product(("vision", "text"), sizes):
        ours, other = (_fastest(rows, names, tower, batch) for names in (OURS, COMPILERS))
        mine = ours.timing(tower, batch) if ours else None
        theirs = other.timing(tower, batch) if other else None
        body.append(
            [
                tower,
                str(batch),
                f"`{ours.target}`" if ours else MISSING,
                number(mine.p50_ms if mine else None),
                f"`{other.target}`" if other else MISSING,
                number(theirs.p50_ms if theirs else None),
                f"{mine.p50_ms / theirs.p50_ms:.2f}" if mine and theirs else MISSING,
                _share(mine, ours.matrix_tflops) if ours and mine else MISSING,
            ]
        )
    return Table(head, body)


def _fastest(rows: list[Row], names: tuple[str, ...], tower: str, batch: int) -> Row | None:
    named = [row for row in rows if row.target.startswith(names)]
    timed = [(timing.p50_ms, row) for row in named if (timing := row.timing(tower, batch)) and not timing.undecided]
    return min(timed, key=lambda each: each[0])[1] if timed else None


def _share(timing: Judged, matrix_tflops: float | None) -> str:
    if not matrix_tflops or timing.gflop is None:
        return MISSING
    return f"{100 * timing.gflop / timing.p50_ms / matrix_tflops:.0f} %"  # GFLOP a millisecond are TFLOP/s


def _tutorial(rows: dict[str, Row]) -> Table:
    head = [
        "Form",
        "Target",
        "Vision ms",
        "Text ms",
        "Images/s",
        "GPU memory GB",
        "Size MB",
        "Tutorial, RTX 3090: ms",
        "GB",
    ]
    body = []
    for form, (target, latency, memory) in TUTORIAL.items():
        row = rows.get(target)
        body.append(
            [
                form,
                f"`{target}`" + ("" if row is not None and row.timings else " (not measured here)"),
                *(stated(row.timing(tower), "p50_ms") if row else MISSING for tower in ("vision", "text")),
                stated_throughput(row) if row else MISSING,
                number(row.gpu_memory_mb / 1000 if row and row.gpu_memory_mb else None),
                number(row.size_mb if row else None),
                str(latency),
                str(memory),
            ]
        )
    return Table(head, body)
