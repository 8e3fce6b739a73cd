"""Check one target against the untouched FP32 model, hold it to its gate, and write its manifest."""

import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import GatesConfig
from clip_deploy.core.files import write_text
from clip_deploy.core.json_files import read_json, rounded, write_json
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.validation import manifest
from clip_deploy.evaluate.validation import validate_apart as check
from stages import stage


@dataclass
class Settings:
    gates: GatesConfig = MISSING
    seed: int = 0
    source: Path = MISSING
    evaluation: Path = MISSING
    model_name: str = MISSING
    environment: Path = MISSING
    output: Path = MISSING
    manifest: Path = MISSING


@stage
def validate(settings: Settings) -> None:
    prepared = load_prepared(settings.evaluation)
    found = check(settings.source, prepared, settings.evaluation / "reference.npz", settings.gates, settings.seed)
    record, software = rounded(found), read_json(settings.environment)["software"]
    facts = {"model": settings.model_name, "seed": settings.seed, "versions": software}
    described = manifest(settings.source, record, facts)
    write_text(settings.manifest, json.dumps(described, indent=1) + "\n")
    write_json(settings.output, record)
    print(f"{settings.source.name}: {record['status']}", *record["reasons"], sep="\n  ")


if __name__ == "__main__":
    validate()
