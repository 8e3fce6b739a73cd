"""One row a target, from what validate and benchmark wrote; its metrics and plots."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.parsing import parse, read_record
from clip_deploy.core.records import (
    Benchmark,
    Diagnosis,
    EndToEnd,
    Fact,
    Facts,
    Graph,
    HeadAgreement,
    Limit,
    Metrics,
    PixelParity,
    Placement,
    Power,
    Retrieval,
    Search,
    Validation,
    ZeroShot,
)
from clip_deploy.report.decisive import Judged, JudgedTimings, Timings, judged, undecided

Fusions = dict[str, dict[str, list[int]]]  # by tower and kind: found, expected


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
    timings: JudgedTimings = field(default_factory=dict)
    threads: int | None = None
    memory_mb: float | None = None
    size_mb: float | None = None
    cosine_min: dict[str, float] = field(default_factory=dict)  # tower -> lowest cosine of any row
    zero_shot: ZeroShot | None = None
    retrieval: Retrieval | None = None
    flips: float | None = None  # percent
    attention: str = ""
    graphs: dict[str, Graph] = field(default_factory=dict)
    fusions: Fusions = field(default_factory=dict)
    search: Search | None = None
    pixels: PixelParity | None = None
    classifier: HeadAgreement | None = None
    device: str = "cpu"
    gpu_memory_mb: float | None = None
    power: Power | None = None
    matrix_tflops: float | None = None
    placement: dict[str, Placement] = field(default_factory=dict)  # by tower
    preprocessed_size: list[int] = field(default_factory=list)  # of the images that it was timed with: height, width
    runtime: str = ""
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of what was judged
    diagnosis: Diagnosis | None = None  # where it missed its gate
    limits: dict[str, Limit] = field(default_factory=dict)  # of its gate, by the setting's name

    def timing(self, tower: str, batch: int | None = None) -> Judged | None:
        """One tower's timing at a batch size, the smallest if none is named; None where it was not timed."""
        sizes = self.timings.get(tower, {})
        return sizes.get(batch or next(iter(sizes), 0))

    def is_undecided(self, tower: str, batch: int | None = None) -> bool:
        """Whether that tower's timing at a batch size decides nothing, or any of its timings if none is named."""
        sizes = self.timings.get(tower, {})
        return any(timing.undecided for size, timing in sizes.items() if batch in (None, size))


def read_rows(targets: list[str], validation: Path, benchmark: Path) -> list[Row]:
    """Read the configured targets' results, the reference first; timings carry the marks of decisive.judged.

    Raises ConfigError where a result is of another version.
    """
    checked = {target: read_record(Validation, validation / f"{target}.json") for target in targets}
    timed = {target: read_record(Benchmark, benchmark / f"{target}.json") for target in targets}
    timings: dict[str, Timings] = {target: timed[target].towers for target in targets}
    marked = judged(timings, {target for target in targets if checked[target].device == "cuda"})
    return [row_of(target, checked[target], timed[target], marked[target]) for target in targets]


def row_of(target: str, checked: Validation, timed: Benchmark, timings: JudgedTimings) -> Row:
    """What validate and benchmark say of a target, as a row of the table. Checked, but not timed, is a failure."""
    status, reasons, found = checked.status, checked.reasons, checked.measured
    if status != "unavailable" and timed.status == "unavailable":
        status, reasons = "fail", [*reasons, f"not timed: {timed.reason}"]
    return Row(
        target=target,
        status=status,
        reasons=reasons,
        precision=checked.precision,
        build=_build(checked.build),
        trained=checked.trained,
        doubts=checked.doubts or [],
        timings=timings,
        threads=timed.threads,
        memory_mb=timed.memory_mb,
        size_mb=checked.size_mb if timed.size_mb is None else timed.size_mb,
        cosine_min={tower: parity.cosine_min for tower, parity in found.parity.items()} if found else {},
        zero_shot=found.zero_shot if found else None,
        retrieval=found.retrieval if found else None,
        flips=found.flips if found else None,
        attention=_attention(checked.graphs),
        graphs=checked.graphs,
        fusions=_fusions(checked.build),
        search=checked.search,
        pixels=checked.pixels,
        classifier=found.classifier if found else None,
        device=checked.device,
        gpu_memory_mb=timed.gpu_memory_mb,
        power=timed.power,
        matrix_tflops=timed.matrix_tflops,
        placement=checked.placement,
        preprocessed_size=timed.preprocessed_size,
        runtime=checked.runtime,
        files=checked.files,
        diagnosis=checked.diagnosis,
        limits=checked.limits,
    )


def _fusions(build: Facts) -> Fusions:
    found = build.get("fusions", {})
    return parse(Fusions, found, "build.fusions")


def _build(build: Facts) -> str:
    """How a target was made, in words."""
    if "note" in build:
        return str(build["note"])
    told = {key: value for key, value in build.items() if key != "fusions"}  # which have a table of their own
    return ", ".join(f"{key.replace('_', ' ')} {_word(value)}" for key, value in told.items())


def _word(value: Fact) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "nothing"
    if isinstance(value, dict):
        return " and ".join(f"{key} {item}" for key, item in value.items())
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _attention(graphs: dict[str, Graph]) -> str:
    """Fused attentions of both towers out of all, "6/6"."""
    if not graphs:
        return ""
    fused = sum(graph.fusion["attention"] for graph in graphs.values())
    return f"{fused}/{sum(graph.fusion['attention_expected'] for graph in graphs.values())}"


def read_flows(targets: list[str], folder: Path) -> dict[str, EndToEnd]:
    """What end_to_end.measure_feeds found for each target."""
    return {target: read_record(EndToEnd, folder / f"{target}.json") for target in targets}


def metrics(rows: list[Row]) -> dict[str, Metrics]:
    """The decisive numbers of each target for targets.json, by <quantity>_<unit>.

    What was measured and decides nothing is None; where that is all of a timing, `timing` says "undecided".
    """
    return {row.target: {**_measured(row), **_withheld(row)} for row in rows}


def _measured(row: Row) -> Metrics:
    found: Metrics = {
        "status": row.status,
        **_speeds(row),
        "images_per_s": best_throughput(row, "vision"),
        "memory_mb": row.memory_mb,
        "gpu_memory_mb": row.gpu_memory_mb,
        "j_per_1000_images": row.power.j_per_1000_images if row.power else None,
        "size_mb": row.size_mb,
        "cosine_min": min(row.cosine_min.values(), default=None),
        "top1_percent": row.zero_shot.top1 if row.zero_shot else None,
        "top1_drop_points": row.zero_shot.top1_drop if row.zero_shot else None,
        "flips_percent": row.flips,
        "image_to_text_r1_percent": row.retrieval.image_to_text_r1 if row.retrieval else None,
        "text_to_image_r1_percent": row.retrieval.text_to_image_r1 if row.retrieval else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _speeds(row: Row) -> dict[str, float]:
    """Of each tower at the smallest batch."""
    timed = [(tower, timing) for tower in TOWERS if (timing := row.timing(tower))]
    return {
        **{f"{tower}_p50_ms": timing.p50_ms for tower, timing in timed},
        **{f"{tower}_speedup": timing.speedup for tower, timing in timed},
    }


def _withheld(row: Row) -> Metrics:
    """None for each number of speed that decides nothing; the best of all batch sizes needs every one of them."""
    keys: list[str] = []
    for tower in row.timings:
        timing = row.timing(tower)
        keys += [f"{tower}_p50_ms"] if timing and timing.undecided else []
        keys += [f"{tower}_speedup"] if timing and timing.unstable else []
    if row.is_undecided("vision"):
        keys += ["images_per_s", *(["j_per_1000_images"] if row.power else [])]
    return {**dict.fromkeys(keys), **({"timing": "undecided"} if any(undecided(row.timings)) else {})}


def best_throughput(row: Row, tower: str) -> float | None:
    """Images or texts per second at the best batch size."""
    return max((timing.throughput_per_s for timing in row.timings.get(tower, {}).values()), default=None)


PLOTS = ("latency", "throughput", "accuracy", "sensitivity")


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
            {"target": row.target, "batch_size": batch, "images_per_s": _decided(timing, "throughput_per_s")}
            for row in rows
            for batch, timing in row.timings.get("vision", {}).items()
        ],
        "accuracy": [
            {
                "target": row.target,
                "vision_p50_ms": _decided(row.timing("vision"), "p50_ms"),
                "top1_percent": row.zero_shot.top1,
            }
            for row in rows
            if row.zero_shot and row.timings
        ],
        "sensitivity": [
            {
                "target": row.target,
                "share_percent": 100 * point.share,
                "top1_drop_points": point.top1_drop,
                "flips_percent": point.flips,
                "cosine": point.cosine,
            }
            for row in rows
            for point in (row.search.curve if row.search else [])
        ],
    }


def _decided(timing: Judged | None, key: str) -> float | None:
    return None if timing is None or timing.undecided else getattr(timing, key)


def doubts(rows: Sequence[Row]) -> list[str]:
    """Why the reference cannot be the model that was meant, chance.doubts: the same in every row that was checked."""
    return next((row.doubts for row in rows if row.doubts), [])
