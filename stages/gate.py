"""Fail, with exit code 1, where a target of ci.required misses its gate, has no result or a stale one.

    python -m stages.gate                        # or `make gate`: after `dvc repro`, as no stage of the pipeline
    python -m stages.gate --against HEAD~1       # and where one lost more than ci.max_... since that git revision
    python -m stages.gate --against HEAD~1 --allow-uncompared    # where the machine or a new target was meant to change

Prints target, quantity, value and limit of every miss, or the verdicts where there is none.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from clip_deploy.core.config import CiConfig, GatesConfig
from clip_deploy.core.errors import DeployError
from clip_deploy.evaluate.gates import GateFailure
from clip_deploy.report.ci_gate import (
    AGAIN,
    Found,
    Reports,
    at_revision,
    check_reports,
    check_required,
    compare_revisions,
    in_folder,
    readable,
    refusals,
    time_again,
    undecided,
    verdicts,
)
from clip_deploy.report.why import changed
from stages import SWEEP, stage
from stages.probe import probed

STATUS = [sys.executable, "-m", "dvc", "status", "--json"]


@dataclass
class Settings:
    ci: CiConfig = MISSING
    gates: GatesConfig = MISSING
    targets: list[str] = field(default_factory=list)
    against: str | None = None  # a git revision
    allow_uncompared: bool = False  # what cannot be held against it is a note, and no miss
    reports: Path = Path("reports")
    built: Path = Path("artifacts")


@stage
def gate(settings: Settings) -> None:
    names, present = settings.ci.required, in_folder(settings.reports)
    check_required(names, settings.targets)
    found = [stale(present), check_reports(names, present, settings.gates, settings.built)]
    if settings.against is not None:
        former = at_revision(settings.against, settings.reports)
        lost, uncompared = compare_revisions(names, present, former, settings.ci)
        found.append(lost)
        if settings.allow_uncompared:
            print("".join(f"note: {name}: {miss}\n" for name, missed in uncompared.items() for miss in missed), end="")
        else:
            found.append(uncompared)
    if any(missed for part in found for missed in part.values()):
        print(refusals(found))
        raise DeployError(f"not all of the {len(names)} required targets can be defended")
    print(verdicts(names, present))
    if spoiled := undecided(names, present):
        print(f"\nnote: timings of {', '.join(spoiled)} decide nothing: {time_again(spoiled)}")
    since = f", and none lost since {settings.against}" if settings.against is not None else ""
    print(f"\n{len(names)} required targets pass{since}")


@readable
def stale(present: Reports) -> Found:
    """What `dvc repro` would do again: results of other settings, code, files, libraries, machine, weights or data.

    DVC sees the last three only once the probe has run: here they are looked at anew.
    """
    done = subprocess.run(STATUS, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(f"`dvc status` cannot tell what is stale: {done.stderr.strip()}")
    status = json.loads(done.stdout)
    found = {name: [in_words(what) for what in why if what != "always changed"] for name, why in status.items()}
    environment, inputs = probed()
    read = present("inputs.json") or {}
    found["probe"] = [*changed(present("environment.json") or {}, environment, "reports/environment.json")]
    found["probe"] += [
        f"{name}: what lies on this disk is not what was read  (reports/inputs.json)"
        for name, what in inputs.items()
        if what != read.get(name)
    ]
    return {name: [GateFailure("stale", what, AGAIN) for what in why] for name, why in found.items()}


def in_words(what: str | dict[str, Any]) -> str:
    """As "changed command", or {"changed deps": {"params.yaml": {"onnx.opset": "modified"}, "stages/a.py": ...}}."""
    if isinstance(what, str):
        return what
    return "; ".join(f"{kind}: {', '.join(_changed(names))}" for kind, names in what.items())


def _changed(names: dict[str, Any]) -> list[str]:
    return [f"{name} {', '.join(inner)}" if isinstance(inner, dict) else name for name, inner in names.items()]


def for_hydra(words: list[str]) -> list[str]:
    """The flags as overrides: `--against HEAD~1` in the quotes that Hydra wants around a ~."""
    if many := [word for word in words if word in SWEEP]:
        sys.exit(f"error: the gate judges one set of results and takes no {many[0]}: name all targets in ci.required")
    words = ["allow_uncompared=true" if word == "--allow-uncompared" else word for word in words]
    if "--against" not in words:
        return words
    at = words.index("--against")
    if len(words) == at + 1:
        sys.exit("error: --against needs a git revision, as HEAD~1")
    return [*words[:at], f'against="{words[at + 1]}"', *words[at + 2 :]]


if __name__ == "__main__":
    sys.argv = for_hydra(sys.argv)
    gate()
