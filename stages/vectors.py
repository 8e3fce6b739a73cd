"""Measure what vectors of fewer dimensions and bits cost a search over the evaluation set."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.json_files import write_json
from clip_deploy.core.parsing import plain
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.embeddings import load_embeddings
from clip_deploy.evaluate.stored_vectors import stored_vectors
from stages import stage


@dataclass
class Settings:
    seed: int = 0
    evaluation: Path = MISSING
    output: Path = MISSING


@stage
def vectors(settings: Settings) -> None:
    reference = load_embeddings(settings.evaluation / "reference.npz")
    found = stored_vectors(reference, load_prepared(settings.evaluation), settings.seed)
    write_json(settings.output, plain(found))
    print(f"{settings.output}: {found.queries} {found.of} search {found.images} images")


if __name__ == "__main__":
    vectors()
