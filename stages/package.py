"""Put what is fit to ship, with all that it needs to run without torch and transformers, into one folder.

target=recommended takes what `advice` ships, reports/shipped.json. A target's name takes that one, if it passed its
gate; `advice` is reports/recommendation.json then, which has all of them.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.builders.package import RECOMMENDED, Sources, write_package
from clip_deploy.core.config import GatesConfig
from clip_deploy.core.environment import Environment
from clip_deploy.core.files import new_folder
from clip_deploy.core.manifest import Run
from clip_deploy.core.parsing import read_record
from clip_deploy.core.recommendation import Recommendation, Shipment
from stages import stage


@dataclass
class Settings:
    gates: GatesConfig = MISSING
    seed: int = 0
    target: str = MISSING
    model_name: str = MISSING
    advice: Path = MISSING
    environment: Path = MISSING
    validation: Path = MISSING
    built: Path = MISSING
    portable: Path = MISSING
    evaluation: Path = MISSING
    output: Path = MISSING


@stage
def package(settings: Settings) -> None:
    kind = Shipment if settings.target == RECOMMENDED else Recommendation
    advice = read_record(kind, settings.advice, null_is_nan=False)
    software = read_record(Environment, settings.environment, null_is_nan=False).software
    sources = Sources(settings.built, settings.validation, settings.portable, settings.evaluation)
    run = Run(settings.model_name, settings.seed, software)
    with new_folder(settings.output) as folder:
        manifest = write_package(advice, settings.target, sources, settings.gates, run, folder)
    print(f"{settings.output}: {manifest.summary()}")


if __name__ == "__main__":
    package()
