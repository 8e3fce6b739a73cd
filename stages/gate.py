"""Fail, with exit code 1, where a target of gate.required misses its gate, has no result or a stale one.

    python -m stages.gate                        # or `make gate`: after `dvc repro`, as no stage of the pipeline
    python -m stages.gate --against HEAD~1       # and where one lost more than gate.max_... since that git revision

Prints target, quantity, value and limit of every miss, or the verdicts where there is none.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from clip_deploy.core.config import GateConfig, GatesConfig
from clip_deploy.core.environment import hardware, software
from clip_deploy.core.errors import DeployError
from clip_deploy.gate import AGAIN, Found, at_revision, check_required, compare, in_folder, judge, refusals, verdicts
from clip_deploy.validation import Miss
from stages import stage

STATUS = [sys.executable, "-m", "dvc", "status", "--json"]


@dataclass
class Settings:
    gate: GateConfig = MISSING
    gates: GatesConfig = MISSING
    targets: list[str] = field(default_factory=list)
    against: str | None = None  # a git revision
    reports: Path = Path("reports")
    built: Path = Path("artifacts")


@stage
def gate(settings: Settings) -> None:
    names, present = settings.gate.required, in_folder(settings.reports)
    check_required(names, settings.targets)
    found = [stale(present("environment.json")), judge(names, present, settings.gates, settings.built)]
    if settings.against:
        former = at_revision(settings.against, settings.reports)
        lost, notes = compare(names, present, former, settings.gate)
        print("".join(f"note: {note}\n" for note in notes), end="")
        found.append(lost)
    if any(missed for part in found for missed in part.values()):
        print(refusals(found))
        raise DeployError(f"not all of the {len(names)} required targets can be defended")
    print(verdicts(names, present))
    since = f", and none lost since {settings.against}" if settings.against else ""
    print(f"\n{len(names)} required targets pass{since}")


def stale(environment: Any) -> Found:
    """What `dvc repro` would do again: results of other settings, code, files, libraries or another machine."""
    done = subprocess.run(STATUS, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(f"`dvc status` cannot tell what is stale: {done.stderr.strip()}")
    status = json.loads(done.stdout)
    changed = {name: [in_words(what) for what in why if what != "always changed"] for name, why in status.items()}
    if environment != {"software": software(), "hardware": hardware()}:
        changed["probe"] = ["reports/environment.json is of another machine or other libraries"]
    return {name: [Miss("stale", what, AGAIN) for what in why] for name, why in changed.items()}


def in_words(what: str | dict[str, Any]) -> str:
    """As "changed command", or {"changed deps": {"params.yaml": {"onnx.opset": "modified"}, "stages/a.py": ...}}."""
    if isinstance(what, str):
        return what
    return "; ".join(f"{kind}: {', '.join(_changed(names))}" for kind, names in what.items())


def _changed(names: dict[str, Any]) -> list[str]:
    return [f"{name} {', '.join(inner)}" if isinstance(inner, dict) else name for name, inner in names.items()]


def for_hydra(words: list[str]) -> list[str]:
    """`--against HEAD~1` as an override, in the quotes that Hydra wants around a ~."""
    if "--against" not in words:
        return words
    at = words.index("--against")
    if len(words) == at + 1:
        sys.exit("error: --against needs a git revision, as HEAD~1")
    return [*words[:at], f'against="{words[at + 1]}"', *words[at + 2 :]]


if __name__ == "__main__":
    sys.argv = for_hydra(sys.argv)
    gate()
