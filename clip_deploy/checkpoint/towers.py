"""The two towers of a dual encoder as modules of their own, each with its projection and none of the other's weights.

Works on every model with get_image_features and get_text_features: transformers' CLIP and SigLIP, open_clip's alike.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from clip_deploy.checkpoint.plain_modules import replace_modules
from clip_deploy.core.model import Model, embeddings, image_feed, random_images


class ImageTower(nn.Module):  # type: ignore[misc]
    """pixel_values [batch, 3, height, width] -> image_embeds [batch, dimension], not normalised.

    SigLIP 2 NaFlex takes patches [batch, patches, values], their mask and [batch, rows and columns].
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        arranged = {}
        if spatial_shapes is not None:
            arranged = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        return embeddings(self.model, "get_image_features", pixel_values=pixel_values, **arranged)


class TextTower(nn.Module):  # type: ignore[misc]
    """input_ids [batch, sequence], attention_mask like it -> text_embeds [batch, dimension], not normalised.

    A model that takes no mask (SigLIP) is called with input_ids alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        return embeddings(self.model, "get_text_features", input_ids=input_ids, **masked)


class CastWrapper(nn.Module):  # type: ignore[misc]
    """A tower that computes in `dtype` and takes and gives float32."""

    def __init__(self, tower: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.tower = tower.to(dtype)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        rounded = (value.to(self.dtype) if value.is_floating_point() else value for value in inputs)
        return self.tower(*rounded).float()


def split(model: PreTrainedModel, inputs: dict[str, tuple[torch.Tensor, ...]]) -> dict[str, nn.Module]:
    """Cut `model` in two. It is not to be used afterwards: its attention is replaced by an equal one.

    Args:
        model: a dual encoder in evaluation mode.
        inputs: example arguments of each tower, by name ("vision", "text").
    """
    replace_modules(model)
    towers: dict[str, nn.Module] = {}
    for name, wrap in (("vision", ImageTower), ("text", TextTower)):
        whole: nn.Module = wrap(model)
        used = _children_used(model, partial(whole.__call__, *inputs[name]))
        towers[name] = wrap(_only(model, used)).eval()
    return towers


def example_inputs(model: Model) -> dict[str, tuple[torch.Tensor, ...]]:
    """Two images and two texts of one word each, for tracing: shapes matter, values do not.

    Args:
        model: as checkpoint.describe gives it.
    """
    tokens = model.context_length if model.pad_to_context else min(16, model.context_length)
    word = {"input_ids": 2}  # 1 is RoBERTa's padding: the mean of a text without words is none
    texts = tuple(torch.full((2, tokens), word.get(name, 1), dtype=torch.int64) for name in model.text_inputs)
    images = image_feed(random_images(2, model.image_dtype))
    return {"vision": tuple(map(torch.from_numpy, images.values())), "text": texts}


def dynamic_axes(model: Model) -> dict[str, dict[int, str]]:
    """Each tower's axes of any length: the batch, and a text's tokens where the model does not pad to its context."""
    batch = {0: "batch"}
    return {"vision": batch, "text": batch if model.pad_to_context else {**batch, 1: "sequence"}}


def _children_used(model: PreTrainedModel, call: Callable[[], object]) -> set[str]:
    """Names of the direct children that `call` runs, wholly or in part."""
    used: set[str] = set()
    hooks = [
        part.register_forward_pre_hook(lambda *_, name=name: used.add(name))
        for name, child in model.named_children()
        for part in child.modules()
    ]
    try:
        with torch.inference_mode():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return used


def _only(model: PreTrainedModel, names: set[str]) -> PreTrainedModel:
    """A shallow copy that shares the weights of the named children and owns nothing else."""
    clone = copy.copy(model)
    clone._modules = {name: child for name, child in model._modules.items() if name in names}
    clone._parameters = {}
    return clone
