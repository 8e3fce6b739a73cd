"""Machines, or runs on one, side by side: the numbers of several reports folders or revisions in one table."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any

from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import no_folder
from clip_deploy.report.revisions import commit_of, committed
from clip_deploy.report.tables import MISSING, number, table

WORDS = ("status", "timing")  # in targets.json, beside the numbers
REPORTS = Path("reports")
GIVE = "give a reports folder, with targets.json and environment.json as `dvc repro` writes them"


@dataclass
class Run:
    """What one reports folder holds.

    Attributes:
        name: of the folder, the revision or the experiment.
        metrics: target -> quantity -> number, as report.metrics gives them.
        hardware, software: the machine and the versions of libraries, as environment.json holds them.
    """

    name: str
    metrics: dict[str, dict[str, Any]]
    hardware: dict[str, Any]
    software: dict[str, str | None]


def read_run(name: str) -> Run:
    """A reports folder, or else reports/ of the repository here at a git revision or in a DVC experiment.

    Raises DeployError where there is none of that name, or one of its two files is missing, broken or something else.
    """
    folder = Path(name)
    if folder.exists() or "/" in name:
        if not folder.is_dir():
            raise DeployError(f"{folder} {no_folder(folder)}; {GIVE}")
        return _run(name, lambda file: _here(folder / file), lambda file: str(folder / file))
    commit = commit_of(name)
    return _run(name, lambda file: committed(REPORTS / file, commit), lambda file: f"{REPORTS / file} at {name}")


def _run(name: str, read: Callable[[str], str | None], named: Callable[[str], str]) -> Run:
    def content(file: str, accepts: Callable[[Any], bool]) -> Any:
        text = read(file)
        if text is None:
            raise DeployError(f"{name} has no {file}; {GIVE}")
        try:
            found = json.loads(text)
        except ValueError as error:
            raise DeployError(f"cannot read {named(file)} ({error}); {GIVE}") from error
        if not accepts(found):
            raise DeployError(f"{named(file)} is not the JSON that `dvc repro` writes; {GIVE}")
        return found

    metrics, environment = content("targets.json", _is_metrics), content("environment.json", _is_environment)
    return Run(name, metrics, environment["hardware"], environment["software"])


def _here(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DeployError(f"cannot read {path} ({error}); {GIVE}") from error


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


READ = (
    "p50 is of a call at the smallest batch size of each run. Above 1.00x, a run took less time than A. No interval is "
    "known here, and two runs on one machine differ too: `clip-deploy gate --against` compares intervals."
)


def comparison(runs: Sequence[Run]) -> str:
    """All machines, the versions that differ, and one line for each target of any run, as Markdown."""
    letters = LETTERS[: len(runs)]
    every = " / ".join(letters)
    lines = [f"- **{letter}**: {_machine(run)}" for letter, run in zip(letters, runs, strict=True)]
    lines += [
        f"- **Same machine**: {_same_machines(letters, [run.hardware for run in runs])}",
        f"- **Versions that differ, {every}**: {_versions([run.software for run in runs])}",
        f"- **Timings that decide nothing, {every}**: {' / '.join(map(_undecided, runs))}",
        "",
    ]
    over = f"A over {', '.join(letters[1:])}"
    head = [
        "Target",
        f"Gate, {every}",
        f"Vision p50 ms, {every}",
        over,
        f"Text p50 ms, {every}",
        over,
        f"Images/s, best batch, {every}",
        f"Memory MB, {every}",
        f"Size MB, {every}",
        f"Lowest cosine, {every}",
        f"Top-1 %, {every}",
        f"Drop, points, {every}",
        f"Flips %, {every}",
    ]
    targets = dict.fromkeys(target for run in runs for target in run.metrics)
    body = [_cells(target, [run.metrics.get(target, {}) for run in runs]) for target in targets]
    return "\n".join([*lines, *table(head, body), "", READ])


def _machine(run: Run) -> str:
    cores = f", {run.hardware['cores']} cores" if "cores" in run.hardware else ""
    gpus = ", ".join(map(str, run.hardware["gpus"])) or "none"
    return f"{run.name}: {run.hardware.get('cpu', 'unknown CPU')}{cores}, GPU: {gpus}"


def _same_machines(letters: str, hardware: Sequence[dict[str, Any]]) -> str:
    """Each that is not A's own, or yes."""
    said = {letter: _same_machine(hardware[0], other) for letter, other in zip(letters, hardware, strict=True)}
    others = {letter: same for letter, same in said.items() if letter != "A" and same != "yes"}
    if not others:
        return "yes"
    return (
        next(iter(others.values())) if len(hardware) == 2 else "; ".join(f"{at}: {same}" for at, same in others.items())
    )


def _same_machine(first: dict[str, Any], second: dict[str, Any]) -> str:
    """By the id of environment.machine, which two machines of one type do not share."""
    one, other = first.get("machine"), second.get("machine")
    alike = {**first, "machine": None} == {**second, "machine": None}
    if one and other:
        return "yes" if one == other else f"no, another machine{' of the same type' if alike else ''}"
    return "not known: of one type, and without an id in environment.json" if alike else "no, another machine"


def _undecided(run: Run) -> str:
    return ", ".join(target for target, row in run.metrics.items() if row.get("timing") == "undecided") or "none"


def _versions(software: Sequence[dict[str, str | None]]) -> str:
    names = dict.fromkeys(name for versions in software for name in versions)
    differ = [name for name in names if len({versions.get(name) for versions in software}) > 1]
    each = [f"{name} {' / '.join(versions.get(name) or MISSING for versions in software)}" for name in differ]
    return ", ".join(each) or "none"


def _cells(target: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    def every(key: str, written: Callable[[Any], str] = number) -> str:
        return " / ".join(written(row.get(key)) for row in rows)

    def ratios(key: str) -> str:
        return " / ".join(_ratio(rows[0].get(key), row.get(key)) for row in rows[1:])

    return [
        f"`{target}`",
        every("status", lambda status: status or MISSING),
        every("vision_p50_ms"),
        ratios("vision_p50_ms"),
        every("text_p50_ms"),
        ratios("text_p50_ms"),
        every("images_per_s"),
        every("memory_mb"),
        every("size_mb"),
        every("cosine_min", lambda cosine: MISSING if cosine is None else f"{cosine:.4f}"),
        *(every(key) for key in ("top1_percent", "top1_drop_points", "flips_percent")),
    ]


def _ratio(first: float | None, second: float | None) -> str:
    return f"{first / second:.2f}x" if first and second else MISSING
