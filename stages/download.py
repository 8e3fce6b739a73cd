"""Fetch the checkpoint (hub, local folder or untrained), check it, and keep it as the target torch-fp32."""

from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.lint import lint
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
    def fetch_checked(folder: Path) -> Target:
        target = fetch(settings.model, folder, settings.device)
        findings = lint(folder, settings.model, target.model)
        print(*findings, sep="\n", end="\n" * bool(findings))
        return replace(target, model=replace(target.model, findings=findings))

    build(settings.output, fetch_checked, None)


if __name__ == "__main__":
    download()
