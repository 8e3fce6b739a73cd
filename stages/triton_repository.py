"""Lay the package out as model repositories for Triton."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import TritonConfig
from clip_deploy.serving.repository import write_repository
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
    if "unavailable" in record:
        print(f"{settings.output}: unavailable: {record['unavailable']}")
        return
    towers = ", ".join(f"{tower}: {facts['target']}" for tower, facts in record["towers"].items())
    print(f"{settings.output}: {towers}; for {' and '.join(record['backends'])}")


if __name__ == "__main__":
    triton_repository()
