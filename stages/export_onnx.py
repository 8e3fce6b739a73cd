"""Export the checkpoint's towers to ONNX at the opset asked for."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.builders.onnx_export import export_onnx as export
from clip_deploy.core.artifact import Target, build
from clip_deploy.core.config import OnnxConfig
from stages import stage


@dataclass
class Settings:
    onnx: OnnxConfig = MISSING
    source: Path = MISSING
    output: Path = MISSING


@stage
def export_onnx(settings: Settings) -> None:
    build(settings.output, lambda folder: export(settings.source, settings.onnx, folder), Target("ort", "fp32"))


if __name__ == "__main__":
    export_onnx()
