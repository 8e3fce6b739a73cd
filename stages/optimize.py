"""Fuse an ONNX target's towers for ONNX Runtime, TensorRT or PyTorch, in FP32, FP16, BF16 or FP8."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.builders.fused import RUNTIME_OF_PROVIDER
from clip_deploy.builders.fused import optimize as fuse
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import Device, OptimizeConfig
from clip_deploy.core.fusions import print_missed
from clip_deploy.data.preprocessed import load_prepared
from stages import stage


@dataclass
class Settings:
    optimize: dict[str, OptimizeConfig] = field(default_factory=dict)
    device: Device = Device.cpu
    seed: int = 0
    target: str = MISSING
    source: Path = MISSING
    calibration: Path = MISSING
    output: Path = MISSING


@stage
def optimize(settings: Settings) -> None:
    chosen = settings.optimize[settings.target]
    fallback = Target(RUNTIME_OF_PROVIDER[chosen.provider], chosen.precision.value, device=settings.device.value)
    calibration = load_prepared(settings.calibration)
    build(
        settings.output,
        lambda folder: fuse(settings.source, chosen, calibration, folder, settings.device, settings.seed),
        fallback,
    )
    print_missed(settings.target, read_target(settings.output).build)


if __name__ == "__main__":
    optimize()
