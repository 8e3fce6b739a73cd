"""Fetch the checkpoint (hub, local folder or untrained), check it, and keep it as the target torch-fp32."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.checkpoint import fetch
from clip_deploy.core.artifact import Target, build
from clip_deploy.core.config import Device, ModelConfig
from stages import stage


@dataclass
class Settings:
    model: ModelConfig = MISSING
    device: Device = Device.cpu
    output: Path = MISSING


@stage
def download(settings: Settings) -> None:
    fallback = Target("eager", "fp32", device=settings.device.value)
    build(settings.output, lambda folder: fetch(settings.model, folder, settings.device), fallback)


if __name__ == "__main__":
    download()
