"""Compile the checkpoint's towers ahead of time with AOTInductor."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.aoti_export import export_aoti as export
from clip_deploy.artifact import Target, build
from clip_deploy.config import AotiConfig
from stages import stage


@dataclass
class Settings:
    export_aoti: dict[str, AotiConfig] = field(default_factory=dict)
    target: str = MISSING
    source: Path = MISSING
    output: Path = MISSING


@stage
def export_aoti(settings: Settings) -> None:
    precision = settings.export_aoti[settings.target].precision
    build(settings.output, lambda folder: export(settings.source, precision, folder), Target("aoti", precision.value))


if __name__ == "__main__":
    export_aoti()
