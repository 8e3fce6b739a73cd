"""Save the checkpoint in half precision, or for torch.compile."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.builders.torch_checkpoint import export_torch as export
from clip_deploy.core.artifact import Target, build
from clip_deploy.core.config import Device, TorchConfig
from stages import stage


@dataclass
class Settings:
    export_torch: dict[str, TorchConfig] = field(default_factory=dict)
    device: Device = Device.cpu
    target: str = MISSING
    source: Path = MISSING
    output: Path = MISSING


@stage
def export_torch(settings: Settings) -> None:
    chosen = settings.export_torch[settings.target]
    fallback = Target("eager", chosen.precision.value, device=settings.device.value)
    build(settings.output, lambda folder: export(settings.source, chosen, settings.device, folder), fallback)


if __name__ == "__main__":
    export_torch()
