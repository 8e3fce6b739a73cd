"""Lay the package out as model repositories for Triton."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import TritonConfig
from clip_deploy.serving.repository import NoRepository, write_repository
from stages import stage


@dataclass
class Settings:
    triton: TritonConfig = MISSING
    package: Path = MISSING
    benchmark_results: Path = MISSING
    output: Path = MISSING


@stage
def triton_repository(settings: Settings) -> None:
    record = write_repository(settings.package, settings.benchmark_results, settings.triton, settings.output)
    if isinstance(record, NoRepository):
        print(f"{settings.output}: unavailable: {record.unavailable}")
        return
    towers = ", ".join(f"{tower}: {served.target}" for tower, served in record.towers.items())
    print(f"{settings.output}: {towers}; for {' and '.join(record.backends)}")


if __name__ == "__main__":
    triton_repository()
