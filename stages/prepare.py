"""Draw and preprocess both sets, encode one with the untouched FP32 model, and write what a package needs of it."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.builders.processor_files import write_portable
from clip_deploy.checkpoint.load import load_processor
from clip_deploy.core.artifact import described_folder, read_target
from clip_deploy.core.config import DataConfig
from clip_deploy.core.errors import listed
from clip_deploy.data.dataset import check_prompts, load
from clip_deploy.data.preprocessed import load_prepared, write_prepared
from clip_deploy.evaluate.chance import doubts
from clip_deploy.evaluate.embeddings import encode_set, save_embeddings
from clip_deploy.runtimes import open_encoder
from clip_deploy.runtimes.pytorch import is_available
from stages import stage


@dataclass
class Settings:
    data: DataConfig = MISSING
    seed: int = 0
    checkpoint: Path = MISSING
    output: Path = MISSING
    images: bool = False  # keep the evaluation images for graphs that preprocess


@stage
def prepare(settings: Settings) -> None:
    check_prompts(settings.data)
    dataset, target = load(settings.data, settings.seed), read_target(settings.checkpoint)
    print(f"{len(dataset.classes)} classes: {listed(dataset.classes)}" if dataset.classes else "no classes")
    model, device = target.model, target.device if is_available(target.device) else "cpu"
    processor = load_processor(settings.checkpoint)
    for name, keep in (("calibration", False), ("evaluation", settings.images)):
        with described_folder(settings.output / name) as folder:
            write_prepared(name, dataset, settings.data.templates, processor, model, folder, keep)
            if name == "evaluation":
                embeddings = encode_set(open_encoder(settings.checkpoint, device=device), load_prepared(folder))
                save_embeddings(embeddings, folder / "reference.npz")
                for doubt in doubts(embeddings, load_prepared(folder)) if model.trained else []:
                    print(f"warning: {doubt}")  # the report says it too; here before all is built
    with described_folder(settings.output / "portable") as folder:
        write_portable(settings.checkpoint, folder)


if __name__ == "__main__":
    prepare()
