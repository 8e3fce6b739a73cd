"""Time one target from JPEG bytes to embeddings, through each feed that suits it."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import BenchmarkConfig, EndToEndConfig, GatesConfig
from clip_deploy.core.json_files import write_json
from clip_deploy.core.parsing import plain
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.timing.end_to_end import measure_feeds
from stages import stage


@dataclass
class Settings:
    benchmark: BenchmarkConfig = MISSING
    end_to_end: EndToEndConfig = MISSING
    gates: GatesConfig = MISSING
    seed: int = 0
    source: Path = MISSING
    checkpoint: Path = MISSING
    evaluation: Path = MISSING
    output: Path = MISSING


@stage
def end_to_end(settings: Settings) -> None:
    prepared = load_prepared(settings.evaluation)
    record = measure_feeds(
        settings.source,
        settings.checkpoint,
        prepared,
        settings.benchmark,
        settings.end_to_end,
        settings.gates,
        settings.seed,
    )
    write_json(settings.output, plain(record))
    for name, row in record.feeds.items():
        speed = f", {row.best.images_per_s:.0f} images/s, bottleneck: {row.best.bottleneck}" if row.best else ""
        reason = f": {row.reason}" if row.reason else ""
        print(f"{settings.source.name} {name}: {row.status}{reason}{speed}")


if __name__ == "__main__":
    end_to_end()
