"""One row a target, from what validate and benchmark wrote; its metrics and plots."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clip_deploy.core.json_files import read_json
from clip_deploy.report.decisive import judged, undecided


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
    fusions: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # by tower and kind: found, expected
    search: dict[str, Any] = field(default_factory=dict)  # sensitivity.Search
    pixels: dict[str, float] = field(default_factory=dict)  # preprocessing.pixel_parity
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
        fusions=checked["build"].get("fusions", {}),
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
    told = {key: value for key, value in build.items() if key != "fusions"}  # which have a table of their own
    return ", ".join(f"{key.replace('_', ' ')} {_word(value)}" for key, value in told.items())


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


def doubts(rows: Sequence[Row]) -> list[str]:
    """Why the reference cannot be the model that was meant, chance.doubts: the same in every row that was checked."""
    return next((row.doubts for row in rows if row.doubts), [])
