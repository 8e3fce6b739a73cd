"""Say which of the configured targets to ship, before anything is packaged; the report shows the same.

Where each tower gets a target of its own, the two are judged together first.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.builders.package import unpackable
from clip_deploy.core.config import GatesConfig, RecommendConfig
from clip_deploy.core.json_files import write_json
from clip_deploy.core.parsing import plain
from clip_deploy.report.recommend import recommend as advise
from clip_deploy.report.rows import read_rows
from clip_deploy.report.tower_pair import pair_row
from stages import stage


@dataclass
class Settings:
    targets: list[str] = field(default_factory=list)
    recommend: RecommendConfig = MISSING
    gates: GatesConfig = MISSING
    validation: Path = MISSING
    benchmark_results: Path = MISSING
    built: Path = MISSING
    evaluation: Path = MISSING
    portable: Path = MISSING
    shipped: Path = MISSING
    output: Path = MISSING


@stage
def recommend(settings: Settings) -> None:
    rows = read_rows(settings.targets, settings.validation, settings.benchmark_results)
    together = partial(pair_row, built=settings.built, evaluation=settings.evaluation, gates=settings.gates)
    advice = advise(
        rows, settings.recommend, together, lambda name: unpackable(settings.built / name, settings.portable)
    )
    write_json(settings.output, plain(advice))
    write_json(settings.shipped, plain(advice.shipment()))
    shipped = f"{', '.join(dict.fromkeys(advice.ship.values())) or 'nothing'} to ship"
    print(f"{settings.output}: {'; '.join([*advice.doubts, shipped, advice.note])}")


if __name__ == "__main__":
    recommend()
