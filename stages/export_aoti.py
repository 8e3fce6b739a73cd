"""Compile both towers ahead of time with AOTInductor, fused, for a CPU or a GPU."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.builders.aoti import export_aoti as export
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import AotiConfig, Device
from clip_deploy.core.fusions import print_missed
from clip_deploy.data.preprocessed import load_prepared
from stages import stage


@dataclass
class Settings:
    export_aoti: dict[str, AotiConfig] = field(default_factory=dict)
    device: Device = Device.cpu
    target: str = MISSING
    source: Path = MISSING
    calibration: Path = MISSING
    output: Path = MISSING


@stage
def export_aoti(settings: Settings) -> None:
    precision, device = settings.export_aoti[settings.target].precision, settings.device
    calibration = load_prepared(settings.calibration)
    build(
        settings.output,
        lambda folder: export(settings.source, precision, calibration, folder, device),
        Target("aoti", precision.value, device=device.value),
    )
    print_missed(settings.target, read_target(settings.output).build)


if __name__ == "__main__":
    export_aoti()
