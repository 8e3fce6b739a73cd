"""Trace the checkpoint's towers into TorchScript, in FP32 or with dynamic INT8 Linear layers."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.builders.torchscript import export_torchscript as export
from clip_deploy.core.artifact import Target, build
from clip_deploy.core.config import Device, TorchScriptConfig
from stages import stage


@dataclass
class Settings:
    export_torchscript: dict[str, TorchScriptConfig] = field(default_factory=dict)
    device: Device = Device.cpu
    target: str = MISSING
    source: Path = MISSING
    output: Path = MISSING


@stage
def export_torchscript(settings: Settings) -> None:
    precision = settings.export_torchscript[settings.target].precision
    fallback = Target("torchscript", precision.value, device=settings.device.value)
    build(settings.output, lambda folder: export(settings.source, precision, folder, settings.device), fallback)


if __name__ == "__main__":
    export_torchscript()
