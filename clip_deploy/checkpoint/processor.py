"""Which folder a model's processor comes from: its own, its base's, or the one that `processor:` names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_deploy.checkpoint.layout import SETTINGS, matching
from clip_deploy.checkpoint.verify import (
    IMAGE_SETTINGS,
    has_image_processor,
    lacking_vocabulary,
    verify_image_processor,
    verify_tokenizer,
)
from clip_deploy.core.errors import CheckpointError

TOKENIZER = tuple(name for name in SETTINGS if name not in ("config.json", *IMAGE_SETTINGS))


def processor_files(folders: Sequence[Path], config: dict[str, Any]) -> list[Path]:
    """The files of an image processor and of a tokenizer, each from the first folder that has it whole.

    Args:
        config: the model's config.json, which decides what a whole tokenizer is.

    Raises CheckpointError where none has it.
    """
    images = next((folder for folder in folders if has_image_processor(folder)), folders[-1])
    words = next((folder for folder in folders if not lacking_vocabulary(folder, config)[1]), folders[-1])
    verify_image_processor(images)
    verify_tokenizer(words, config)
    found = [(images, name) for name in matching(images, IMAGE_SETTINGS)]
    found += [(words, name) for name in matching(words, TOKENIZER)]
    return [folder / name for folder, name in found]


def refuse_unused(name: object, folder: Path, files: Sequence[Path]) -> None:
    """Raise CheckpointError where nothing comes from the folder that `processor:` names: it would have no effect."""
    if all(path.parent != folder for path in files):
        raise CheckpointError(
            f"model.processor is {name}, but the model has a processor and a tokenizer of its own: remove the setting, "
            "or move these files away"
        )
