"""Start a real Triton server over the model repository and hold it against the package."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import TritonCheckConfig
from clip_deploy.core.json_files import write_json
from clip_deploy.core.parsing import plain
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.serving.validation import check_served
from stages import stage


@dataclass
class Settings:
    triton_check: TritonCheckConfig = MISSING
    seed: int = 0
    repository: Path = MISSING
    package: Path = MISSING
    evaluation: Path = MISSING
    output: Path = MISSING


@stage
def validate_triton(settings: Settings) -> None:
    prepared = load_prepared(settings.evaluation)
    record = check_served(settings.repository, settings.package, prepared, settings.triton_check, settings.seed)
    write_json(settings.output, plain(record))
    print(f"triton: {record.status}", *record.reasons, sep="\n  ")


if __name__ == "__main__":
    validate_triton()
