"""Two targets as one, the image tower of one with the text tower of the other: together they were never judged."""

from dataclasses import replace
from pathlib import Path

from clip_deploy.core.artifact import check_files, failure, read_target
from clip_deploy.core.config import GatesConfig
from clip_deploy.core.errors import DeployError
from clip_deploy.core.subprocesses import call_in_child
from clip_deploy.evaluate.gates import check_gate, gate_of
from clip_deploy.evaluate.tower_pair import measure_pair
from clip_deploy.report.rows import Row

COARSENESS = ("fp32", "fp16", "bf16", "fp8", "int8")  # a pair is held to the gate of its coarser target


def pair_row(vision: Row, text: Row, built: Path, evaluation: Path, gates: GatesConfig) -> Row:
    """The row of a pair, from the rows of its two targets.

    Timings are each tower's own, size is that of the files which both towers need. Memory is the sum of both targets',
    which together take no more: nobody measured them in one process.

    Args:
        built: the folder with both targets' folders.
        evaluation: the prepared set, with the untouched model's embeddings in reference.npz.

    Raises DeployError where a target's files are not those that were built.
    """
    folders = {"vision": built / vision.target, "text": built / text.target}
    for folder in folders.values():
        check_files(folder)
    precision = max(vision.precision, text.precision, key=COARSENESS.index)
    row = replace(
        vision,
        target=f"{vision.target} with {text.target}",
        precision=precision,
        timings={"vision": vision.timings["vision"], "text": text.timings["text"]},
        memory_mb=_sum(vision.memory_mb, text.memory_mb),
        gpu_memory_mb=_sum(vision.gpu_memory_mb, text.gpu_memory_mb),
        cosine_min={
            tower: row.cosine_min[tower]
            for tower, row in (("vision", vision), ("text", text))
            if tower in row.cosine_min
        },
        size_mb=(tower_bytes(folders["vision"], "vision") + tower_bytes(folders["text"], "text")) / 1e6,
    )
    try:
        found = call_in_child(measure_pair, folders, evaluation, timeout_s=gates.timeout_s)
    except Exception as error:  # whatever a library raises is this row's result
        reason = str(error) if isinstance(error, DeployError) else failure(error)
        return replace(row, status="fail", reasons=[reason])
    reasons = check_gate(found, row.trained, gate_of(gates, precision), precision)
    return replace(row, status="fail" if reasons else "pass", reasons=reasons, zero_shot=found.zero_shot)


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def tower_bytes(folder: Path, tower: str) -> int:
    """Of a target's files those that one tower needs: all but the other tower's own."""
    other = "text." if tower == "vision" else "vision."
    return sum((folder / name).stat().st_size for name in read_target(folder).files if not name.startswith(other))
