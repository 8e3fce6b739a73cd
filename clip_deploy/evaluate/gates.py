"""Whether what was measured of a target keeps its gate, and what a manifest says of it."""

from dataclasses import asdict, dataclass
from math import nan
from typing import Any

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.config import GateLimits, GatesConfig
from clip_deploy.core.fusions import ADVICE, missed

LENGTH_ERROR = 1e-3  # of embeddings that onnx.normalize makes
MEASURED = ("shapes", "flips", "trained", "doubts")  # besides both towers' parity: what no record lacks that passed


@dataclass(frozen=True)
class GateFailure:
    """One way in which a target misses its gate: of what, how much, and the limit that it breaks."""

    quantity: str
    value: str
    limit: str = ""

    def __str__(self) -> str:
        return f"{self.quantity} {self.value} {self.limit}".rstrip()


def check_gate(record: dict[str, Any], gate: GateLimits, precision: str) -> list[str]:
    """Every way in which the target misses its gate, in words."""
    return [str(miss) for miss in gate_failures(record, gate, precision)]


def reference_failures(record: dict[str, Any], gates: GatesConfig) -> list[GateFailure]:
    """What speaks against the reference itself, where gates.above_chance asks for it: no target is better than that."""
    return [GateFailure(doubt, "(gates.above_chance)") for doubt in record.get("doubts", []) if gates.above_chance]


def fusion_failures(record: dict[str, Any], gates: GatesConfig) -> list[GateFailure]:
    """The operations that the target's fusions missed, where gates.fusions asks for all of them."""
    found = missed(record.get("build", {})) if gates.fusions else []
    return [GateFailure(f"{item}:", ADVICE, "(gates.fusions)") for item in found]


def gate_failures(record: dict[str, Any], gate: GateLimits, precision: str) -> list[GateFailure]:
    """Every way in which the target misses its gate; random weights are held to the cosine only."""
    found = [
        GateFailure(tower, "gives NaN or infinity")
        for tower, parity in record["parity"].items()
        if not parity["finite"]
    ]
    cosines = _cosines(record)
    if not record.get("length_error", 0.0) <= LENGTH_ERROR:
        found.append(GateFailure("onnx.normalize: an embedding's length is off 1 by", f"{record['length_error']:.1e}"))
    low = sorted((name for name in cosines if not cosines[name] >= gate.min_cosine), key=lambda name: cosines[name])
    if low:
        others = f", and {len(low) - 1} more ({', '.join(low[1:])})" if low[1:] else ""
        limit = f"< {gate.min_cosine} (gates.{precision}.min_cosine){others}"
        found.append(GateFailure(f"{low[0]}: cosine", f"{cosines[low[0]]:.6f}", limit))
    if record["trained"]:
        drop = record.get("zero_shot", {}).get("top1_drop", 0.0)
        changed = _changed_by_head(record)
        flips = f"> {gate.max_flips} (gates.{precision}.max_flips)"
        if not drop <= gate.max_top1_drop:
            limit = f"> {gate.max_top1_drop} (gates.{precision}.max_top1_drop)"
            found.append(GateFailure("top-1 drop", f"{drop:.2f} points", limit))
        if not changed <= gate.max_flips:
            found.append(GateFailure("the zero-shot head changes", f"{changed:.2f} %", flips))
        if not record["flips"] <= gate.max_flips:
            found.append(GateFailure("flips", f"{record['flips']:.2f} %", flips))
    return found


def _cosines(record: dict[str, Any]) -> dict[str, float]:
    return {tower: parity["cosine_min"] for tower, parity in record["parity"].items()} | record["shapes"]


def _changed_by_head(record: dict[str, Any]) -> float:
    return 100 - record.get("classifier", {}).get("agreement_percent", 100.0)


def failures_now(record: dict[str, Any], gates: GatesConfig) -> list[GateFailure]:
    """What keeps a target from passing: its numbers against the gates as they are now, and its own verdict.

    Args:
        record: what validate said of it. A number that is NaN keeps no limit, and what was not measured passes none.
    """
    record = numbers(record)
    whole = set(TOWERS) <= set(record.get("parity", {})) and set(MEASURED) <= set(record)
    found = gate_failures(record, getattr(gates, record["precision"]), record["precision"]) if whole else []
    found += reference_failures(record, gates) + fusion_failures(record, gates)
    if found:
        return found
    status = record.get("status")
    if status != "pass":
        return [GateFailure("gate", str(status), "; ".join(record.get("reasons", [])))]
    return [] if whole else [GateFailure("gate", "pass, and not all was measured", "run `dvc repro`")]


def numbers(value: Any) -> Any:
    """NaN in the place of null, as which results.write_json writes it: it keeps no limit."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    return nan if value is None else value


def limits(record: dict[str, Any], gate: GateLimits) -> dict[str, dict[str, Any]]:
    """Each limit of the gate with the worst value that was held against it, or why none was.

    Returns:
        By the limit's name: `limit`, and `value` or `unchecked`, in the limit's unit.
    """
    values: dict[str, float | str] = dict.fromkeys(asdict(gate), "not measured")
    if "parity" in record:
        values["min_cosine"] = min(_cosines(record).values())
        drop = record.get("zero_shot", {}).get("top1_drop", "the evaluation set has no classes")
        answers = {"max_top1_drop": drop, "max_flips": max(record["flips"], _changed_by_head(record))}
        values |= answers if record["trained"] else dict.fromkeys(answers, "the weights are random")
    return {
        name: {"limit": limit, "unchecked" if isinstance(values[name], str) else "value": values[name]}
        for name, limit in asdict(gate).items()
    }
