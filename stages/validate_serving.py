"""Serve the package by `clip-deploy serve` and hold its answers against the package."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.json_files import write_json
from clip_deploy.core.parsing import plain
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.web.validation import check_http
from stages import stage


@dataclass
class Settings:
    seed: int = 0
    package: Path = MISSING
    evaluation: Path = MISSING
    output: Path = MISSING


@stage
def validate_serving(settings: Settings) -> None:
    record = check_http(settings.package, load_prepared(settings.evaluation), settings.seed)
    write_json(settings.output, plain(record))
    print(f"serving: {record.status}", *record.reasons, sep="\n  ")


if __name__ == "__main__":
    validate_serving()
