"""Quantise an ONNX target's towers to INT8, dynamically or with calibrated ranges."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.builders.quantize import quantize as quantized
from clip_deploy.core.artifact import Target, build
from clip_deploy.core.config import QuantizeConfig
from clip_deploy.core.json_files import read_json
from clip_deploy.data.preprocessed import load_prepared
from stages import stage


@dataclass
class Settings:
    quantize: dict[str, QuantizeConfig] = field(default_factory=dict)
    seed: int = 0
    target: str = MISSING
    source: Path = MISSING
    calibration: Path = MISSING
    environment: Path = MISSING
    output: Path = MISSING


@stage
def quantize(settings: Settings) -> None:
    calibration = load_prepared(settings.calibration)
    instruction_sets = read_json(settings.environment)["hardware"]["instruction_sets"]
    chosen = settings.quantize[settings.target]
    build(
        settings.output,
        lambda folder: quantized(settings.source, chosen, calibration, instruction_sets, settings.seed, folder),
        Target("ort", "int8"),
    )


if __name__ == "__main__":
    quantize()
