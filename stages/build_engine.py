"""Build TensorRT engines of both towers for this machine's GPU, in FP32 or FP16."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.builders.tensorrt import build_engine as build_towers
from clip_deploy.core.artifact import Target, build
from clip_deploy.core.config import BuildEngineConfig
from clip_deploy.data.preprocessed import load_prepared
from stages import stage


@dataclass
class Settings:
    build_engine: dict[str, BuildEngineConfig] = field(default_factory=dict)
    target: str = MISSING
    source: Path = MISSING
    calibration: Path = MISSING
    output: Path = MISSING


@stage
def build_engine(settings: Settings) -> None:
    chosen = settings.build_engine[settings.target]
    calibration = load_prepared(settings.calibration)
    build(
        settings.output,
        lambda folder: build_towers(settings.source, chosen, calibration, folder),
        Target("tensorrt", chosen.precision.value, device="cuda"),
    )


if __name__ == "__main__":
    build_engine()
