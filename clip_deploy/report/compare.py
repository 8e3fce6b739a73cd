"""Two machines, or two runs on one, side by side: the numbers of two reports folders in one table."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import no_folder
from clip_deploy.report.tables import MISSING, number, table

WORDS = ("status", "timing")  # in metrics.json, beside the numbers
GIVE = "give a reports folder, with metrics.json and environment.json as `dvc repro` writes them"


@dataclass
class Run:
    """What one reports folder holds.

    Attributes:
        metrics: target -> quantity -> number, as report.metrics gives them.
        hardware, software: the machine and the versions of libraries, as environment.json holds them.
    """

    folder: Path
    metrics: dict[str, dict[str, Any]]
    hardware: dict[str, Any]
    software: dict[str, str | None]


def read_run(folder: Path) -> Run:
    """Raises DeployError where the folder or one of its two files is missing, broken or something else."""
    if not folder.is_dir():
        raise DeployError(f"{folder} {no_folder(folder)}; {GIVE}")
    metrics = _read(folder / "metrics.json", _is_metrics)
    environment = _read(folder / "environment.json", _is_environment)
    return Run(folder, metrics, environment["hardware"], environment["software"])


def _read(path: Path, accepts: Callable[[Any], bool]) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DeployError(f"{path.parent} has no {path.name}; {GIVE}") from error
    except (OSError, ValueError) as error:
        raise DeployError(f"cannot read {path} ({error}); {GIVE}") from error
    if not accepts(content):
        raise DeployError(f"{path} is JSON of another kind; {GIVE}")
    return content


def _is_metrics(content: Any) -> bool:
    if not isinstance(content, dict) or not all(isinstance(row, dict) for row in content.values()):
        return False
    values = [value for row in content.values() for key, value in row.items() if key not in WORDS]
    return all(value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in values)


def _is_environment(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    hardware, software = content.get("hardware"), content.get("software")
    return isinstance(software, dict) and isinstance(hardware, dict) and isinstance(hardware.get("gpus"), list)


def comparison(first: Run, second: Run) -> str:
    """Both machines, the versions that differ, and one line for each target of either run, as Markdown."""
    lines = [f"- **{letter}**: {_machine(run)}" for letter, run in (("A", first), ("B", second))]
    lines += [
        f"- **Same machine**: {_same_machine(first.hardware, second.hardware)}",
        f"- **Versions that differ, A / B**: {_versions(first.software, second.software)}",
        f"- **Timings that decide nothing, A / B**: {_undecided(first)} / {_undecided(second)}",
        "",
    ]
    head = [
        "Target",
        "Gate, A / B",
        "Vision p50 ms, A / B",
        "A over B",
        "Text p50 ms, A / B",
        "A over B",
        "Images/s, A / B",
        "Memory MB, A / B",
        "Size MB, A / B",
        "Lowest cosine, A / B",
    ]
    targets = dict.fromkeys([*first.metrics, *second.metrics])
    body = [_cells(target, first.metrics.get(target, {}), second.metrics.get(target, {})) for target in targets]
    return "\n".join([*lines, *table(head, body), "", "Above 1.00x, B is the faster one."])


def _machine(run: Run) -> str:
    cores = f", {run.hardware['cores']} cores" if "cores" in run.hardware else ""
    gpus = ", ".join(map(str, run.hardware["gpus"])) or "none"
    return f"{run.folder}: {run.hardware.get('cpu', 'unknown CPU')}{cores}, GPU: {gpus}"


def _same_machine(first: dict[str, Any], second: dict[str, Any]) -> str:
    """By the id of environment.machine, which two machines of one type do not share."""
    one, other = first.get("machine"), second.get("machine")
    alike = {**first, "machine": None} == {**second, "machine": None}
    if one and other:
        return "yes" if one == other else f"no, another machine{' of the same type' if alike else ''}"
    return "not known: of one type, and without an id in environment.json" if alike else "no, another machine"


def _undecided(run: Run) -> str:
    return ", ".join(target for target, row in run.metrics.items() if row.get("timing") == "undecided") or "none"


def _versions(first: dict[str, str | None], second: dict[str, str | None]) -> str:
    names = [name for name in dict.fromkeys([*first, *second]) if first.get(name) != second.get(name)]
    pairs = [f"{name} {first.get(name) or MISSING} / {second.get(name) or MISSING}" for name in names]
    return ", ".join(pairs) or "none"


def _cells(target: str, first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    def both(key: str, written: Callable[[Any], str] = number) -> str:
        return f"{written(first.get(key))} / {written(second.get(key))}"

    return [
        f"`{target}`",
        both("status", lambda status: status or MISSING),
        both("vision_p50_ms"),
        _ratio(first.get("vision_p50_ms"), second.get("vision_p50_ms")),
        both("text_p50_ms"),
        _ratio(first.get("text_p50_ms"), second.get("text_p50_ms")),
        both("images_per_s"),
        both("memory_mb"),
        both("size_mb"),
        both("cosine_min", lambda cosine: MISSING if cosine is None else f"{cosine:.4f}"),
    ]


def _ratio(first: float | None, second: float | None) -> str:
    return f"{first / second:.2f}x" if first and second else MISSING
