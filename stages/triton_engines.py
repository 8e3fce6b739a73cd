"""Lay a target's TensorRT engines out as a model repository for Triton's tensorrt backend."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import BuildEngineConfig, GatesConfig, TritonConfig
from clip_deploy.core.json_files import read_json
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
        read_json(settings.validation),
        settings.gates,
        read_json(settings.manifest),
        settings.prepared,
        settings.benchmark_results,
        settings.build_engine[settings.target],
        settings.triton,
        settings.output,
    )
    print(f"{settings.output}: {record.get('library') or 'unavailable: ' + record['unavailable']}")


if __name__ == "__main__":
    triton_engines()
