"""Convert both towers to OpenVINO, fused, in FP32, for bf16 or in INT8 by NNCF."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.builders.openvino import export_openvino as export
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import OpenVinoConfig
from clip_deploy.core.fusions import print_missed
from clip_deploy.data.preprocessed import load_prepared
from stages import stage


@dataclass
class Settings:
    export_openvino: dict[str, OpenVinoConfig] = field(default_factory=dict)
    seed: int = 0
    target: str = MISSING
    source: Path = MISSING
    calibration: Path = MISSING
    output: Path = MISSING


@stage
def export_openvino(settings: Settings) -> None:
    chosen = settings.export_openvino[settings.target]
    calibration = load_prepared(settings.calibration)
    build(
        settings.output,
        lambda folder: export(settings.source, chosen, calibration, settings.seed, folder),
        Target("openvino", chosen.precision.value),
    )
    print_missed(settings.target, read_target(settings.output).build)


if __name__ == "__main__":
    export_openvino()
