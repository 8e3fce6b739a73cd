"""A few made-up images and texts, embedded by a model before and after it is rewritten."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_deploy.checkpoint.load import load_with_report
from clip_deploy.core.errors import CheckpointError
from clip_deploy.core.model import Model, embeddings, image_dtype, image_feed, random_images

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def load_whole(folder: Path) -> "PreTrainedModel":
    """A model that is to be rewritten, in evaluation mode: in what is saved of it the linter would not see its faults.

    Raises CheckpointError where weights are missing, of another shape, or without a place.
    """
    model, loading = load_with_report(folder)
    faults = {
        "lacks": loading["missing_keys"],
        "has in another shape than config.json says": [entry[0] for entry in loading["mismatched_keys"]],
        "has without a place": [name for name in loading["unexpected_keys"] if not name.endswith("position_ids")],
    }
    for what, names in faults.items():
        if names:
            raise CheckpointError(f"{folder} {what} {some(sorted(names))}: it is not a whole {type(model).__name__}")
    return model.eval()


def some(names: list[str]) -> str:
    """The first of these names, and how many more there are, for a message."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def trial_inputs(described: Model, model: "PreTrainedModel") -> dict[str, Any]:
    """Two random images and three texts, as arguments of a model's two methods."""
    import torch

    stated = getattr(model.config.vision_config, "image_size", None)
    size = [stated, stated] if isinstance(stated, int) else described.image_size
    pixels = image_feed(random_images(2, image_dtype(size, described.patches)))
    images = {name: torch.from_numpy(values) for name, values in pixels.items()}
    texts = {name: torch.tensor(ids) for name, ids in described.example_texts.items()}
    return {"get_image_features": images, "get_text_features": texts}


def embed(model: "nn.Module", inputs: dict[str, Any]) -> "list[Tensor]":
    """Image and text embeddings."""
    import torch

    with torch.inference_mode():
        return [embeddings(model, method, **given) for method, given in inputs.items()]


def apart(ones: "list[Tensor]", others: "list[Tensor]") -> list[float]:
    """Of images and of texts, the largest 1 - cosine of a row; NaN counts as 2."""
    from torch.nn.functional import cosine_similarity

    pairs = zip(ones, others, strict=True)
    lowest = [float(cosine_similarity(one.double(), other.double()).nan_to_num(-1).min()) for one, other in pairs]
    return [1 - cosine for cosine in lowest]
