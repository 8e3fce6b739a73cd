"""Say which of the configured targets to ship, before anything is packaged; the report shows the same."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import RecommendConfig
from clip_deploy.core.results import write_json
from clip_deploy.recommend import recommend as advise
from clip_deploy.report import read_rows
from stages import stage


@dataclass
class Settings:
    targets: list[str] = field(default_factory=list)
    recommend: RecommendConfig = MISSING
    validation: Path = MISSING
    benchmark_results: Path = MISSING
    output: Path = MISSING


@stage
def recommend(settings: Settings) -> None:
    rows = read_rows(settings.targets, settings.validation, settings.benchmark_results)
    advice = advise(rows, settings.recommend)
    write_json(settings.output, asdict(advice))
    print(f"{settings.output}: {', '.join(dict.fromkeys(advice.ship.values())) or 'nothing'} to ship; {advice.note}")


if __name__ == "__main__":
    recommend()
