"""Whether what was measured of a target keeps its gate, and what a manifest says of it."""

from dataclasses import asdict, dataclass

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.config import GateLimits, GatesConfig
from clip_deploy.core.fusions import ADVICE
from clip_deploy.core.fusions import missed as missed_fusions
from clip_deploy.core.records import Limit, Measured, Validation

LENGTH_ERROR = 1e-3  # of embeddings that onnx.normalize makes
FORESEEN, ROUNDING = 3.0, 2e-4  # times what a search simulated may be lost, and float16's rounding: 1.0 to 1.4 is usual


@dataclass(frozen=True)
class GateFailure:
    """One way in which a target misses its gate: of what, how much, and the limit that it breaks."""

    quantity: str
    value: str
    limit: str = ""

    def __str__(self) -> str:
        return f"{self.quantity} {self.value} {self.limit}".rstrip()


def gate_of(gates: GatesConfig, precision: str) -> GateLimits:
    """The gate of a precision class."""
    gate: GateLimits = getattr(gates, precision)
    return gate


def check_gate(found: Measured, trained: bool, gate: GateLimits, precision: str) -> list[str]:
    """Every way in which the target misses its gate, in words."""
    return [str(miss) for miss in gate_failures(found, trained, gate, precision)]


def reference_failures(record: Validation, gates: GatesConfig) -> list[GateFailure]:
    """What speaks against the reference itself, where gates.above_chance asks for it: no target is better than that."""
    return [GateFailure(doubt, "(gates.above_chance)") for doubt in record.doubts or [] if gates.above_chance]


def fusion_failures(record: Validation, gates: GatesConfig) -> list[GateFailure]:
    """The operations that the target's fusions missed, where gates.fusions asks for all of them."""
    found = missed_fusions(record.build) if gates.fusions else []
    return [GateFailure(f"{item}:", ADVICE, "(gates.fusions)") for item in found]


def search_failures(record: Validation) -> list[GateFailure]:
    """A target further from FP32 than the search for its accuracy budget simulated: it computes something else."""
    if record.search is None or record.measured is None:
        return []
    mean = sum(parity.cosine_mean for parity in record.measured.parity.values()) / len(record.measured.parity)
    if 1 - mean <= FORESEEN * (1 - record.search.cosine) + ROUNDING:
        return []
    simulated = f"the search for its accuracy budget simulated {record.search.cosine:.5f}"
    return [
        GateFailure("mean cosine", f"{mean:.5f}", f"({simulated}: the runtime does not compute what was quantised)")
    ]


def gate_failures(found: Measured, trained: bool, gate: GateLimits, precision: str) -> list[GateFailure]:
    """Every way in which the target misses its gate; random weights are held to the cosine only."""
    missed = [
        GateFailure(tower, "gives NaN or infinity") for tower, parity in found.parity.items() if not parity.finite
    ]
    cosines = _cosines(found)
    if found.length_error is not None and not found.length_error <= LENGTH_ERROR:
        missed.append(GateFailure("onnx.normalize: an embedding's length is off 1 by", f"{found.length_error:.1e}"))
    low = sorted((name for name in cosines if not cosines[name] >= gate.min_cosine), key=lambda name: cosines[name])
    if low:
        others = f", and {len(low) - 1} more ({', '.join(low[1:])})" if low[1:] else ""
        limit = f"< {gate.min_cosine} (gates.{precision}.min_cosine){others}"
        missed.append(GateFailure(f"{low[0]}: cosine", f"{cosines[low[0]]:.6f}", limit))
    return missed + (_wrong_answers(found, gate, precision) if trained else [])


def _wrong_answers(found: Measured, gate: GateLimits, precision: str) -> list[GateFailure]:
    missed = []
    drop = found.zero_shot.top1_drop if found.zero_shot else 0.0
    changed = _changed_by_head(found)
    flips = f"> {gate.max_flips} (gates.{precision}.max_flips)"
    if not drop <= gate.max_top1_drop:
        limit = f"> {gate.max_top1_drop} (gates.{precision}.max_top1_drop)"
        missed.append(GateFailure("top-1 drop", f"{drop:.2f} points", limit))
    if not changed <= gate.max_flips:
        missed.append(GateFailure("the zero-shot head changes", f"{changed:.2f} %", flips))
    if not found.flips <= gate.max_flips:
        missed.append(GateFailure("flips", f"{found.flips:.2f} %", flips))
    return missed


def _cosines(found: Measured) -> dict[str, float]:
    return {tower: parity.cosine_min for tower, parity in found.parity.items()} | found.shapes


def _changed_by_head(found: Measured) -> float:
    agreement = found.classifier.agreement_percent if found.classifier else None
    return 0.0 if agreement is None else 100 - agreement


def failures_now(record: Validation, gates: GatesConfig) -> list[GateFailure]:
    """What keeps a target from passing: its numbers against the gates as they are now, and its own verdict.

    A number that is NaN keeps no limit, and what was not measured passes none.
    """
    found = record.measured
    whole = found is not None and set(TOWERS) <= set(found.parity) and record.doubts is not None
    gate = gate_of(gates, record.precision)
    missed = gate_failures(found, record.trained, gate, record.precision) if found and whole else []
    missed += reference_failures(record, gates) + fusion_failures(record, gates) + search_failures(record)
    if missed:
        return missed
    if record.status != "pass":
        return [GateFailure("gate", record.status, "; ".join(record.reasons))]
    return [] if whole else [GateFailure("gate", "pass, and not all was measured", "run `dvc repro`")]


def limits(found: Measured, trained: bool, gate: GateLimits) -> dict[str, Limit]:
    """Each limit of the gate with the worst value that was held against it, or why none was, in the limit's unit."""
    values: dict[str, float | str] = {"min_cosine": min(_cosines(found).values())}
    drop = found.zero_shot.top1_drop if found.zero_shot else "the evaluation set has no classes"
    answers = {"max_top1_drop": drop, "max_flips": max(found.flips, _changed_by_head(found))}
    values |= answers if trained else dict.fromkeys(answers, "the weights are random")
    return {name: _limit(limit, values[name]) for name, limit in asdict(gate).items()}


def _limit(limit: float, value: float | str) -> Limit:
    return Limit(limit, unchecked=value) if isinstance(value, str) else Limit(limit, value)
