"""Check one target against the untouched FP32 model and hold it to its gate."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import GatesConfig
from clip_deploy.core.results import write_json
from clip_deploy.prepared import load_prepared
from clip_deploy.validation import validate_apart as check
from stages import stage


@dataclass
class Settings:
    gates: GatesConfig = MISSING
    seed: int = 0
    source: Path = MISSING
    evaluation: Path = MISSING
    output: Path = MISSING


@stage
def validate(settings: Settings) -> None:
    prepared = load_prepared(settings.evaluation)
    record = check(settings.source, prepared, settings.evaluation / "reference.npz", settings.gates, settings.seed)
    write_json(settings.output, record)
    print(f"{settings.source.name}: {record['status']}", *record["reasons"], sep="\n  ")


if __name__ == "__main__":
    validate()
