"""Check one target against the untouched FP32 model, hold it to its gate, and write its manifest."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import GatesConfig
from clip_deploy.core.environment import Environment
from clip_deploy.core.json_files import write_json
from clip_deploy.core.manifest import Run, save_manifest
from clip_deploy.core.parsing import plain, read_record
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
    software = read_record(Environment, settings.environment, null_is_nan=False).software
    run = Run(settings.model_name, settings.seed, software)
    save_manifest(settings.manifest, manifest(settings.source, found, run), indent=1)
    write_json(settings.output, plain(found))
    print(f"{settings.source.name}: {found.status}", *found.reasons, sep="\n  ")


if __name__ == "__main__":
    validate()
