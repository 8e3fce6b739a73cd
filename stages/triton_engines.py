"""Lay a target's TensorRT engines out as a model repository for Triton's tensorrt backend."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import BuildEngineConfig, GatesConfig, TritonConfig
from clip_deploy.core.manifest import TargetManifest
from clip_deploy.core.parsing import read_record
from clip_deploy.core.records import Validation
from clip_deploy.serving.repository import NoRepository
from clip_deploy.serving.tensorrt_repository import write_engine_repository
from stages import stage


@dataclass
class Settings:
    build_engine: dict[str, BuildEngineConfig] = field(default_factory=dict)
    gates: GatesConfig = MISSING
    triton: TritonConfig = MISSING
    target: str = MISSING
    built: Path = MISSING
    validation: Path = MISSING
    manifest: Path = MISSING
    prepared: Path = MISSING
    benchmark_results: Path = MISSING
    output: Path = MISSING


@stage
def triton_engines(settings: Settings) -> None:
    record = write_engine_repository(
        settings.built,
        read_record(Validation, settings.validation),
        settings.gates,
        read_record(TargetManifest, settings.manifest).origin,
        settings.prepared,
        settings.benchmark_results,
        settings.build_engine[settings.target],
        settings.triton,
        settings.output,
    )
    said = f"unavailable: {record.unavailable}" if isinstance(record, NoRepository) else record.library
    print(f"{settings.output}: {said}")


if __name__ == "__main__":
    triton_engines()
