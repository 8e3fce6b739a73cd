"""The two towers of a dual encoder as modules of their own, each with its projection and none of the other's weights.

Works on every model of transformers with get_image_features and get_text_features, CLIP and SigLIP alike.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from clip_deploy.core.model import Model


class ImageTower(nn.Module):  # type: ignore[misc]
    """pixel_values [batch, 3, height, width] -> image_embeds [batch, dimension], not normalised."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output


class TextTower(nn.Module):  # type: ignore[misc]
    """input_ids [batch, sequence], attention_mask like it -> text_embeds [batch, dimension], not normalised.

    A model that takes no mask (SigLIP) is called with input_ids alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        return self.model.get_text_features(input_ids=input_ids, **masked).pooler_output


class CastWrapper(nn.Module):  # type: ignore[misc]
    """A tower that computes in `dtype` and takes and gives float32."""

    def __init__(self, tower: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.tower = tower.to(dtype)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        rounded = (value.to(self.dtype) if value.is_floating_point() else value for value in inputs)
        return self.tower(*rounded).float()


class PoolingAttention(nn.Module):  # type: ignore[misc]
    """nn.MultiheadAttention as transformers' own layers compute attention, so that exporters write one pattern.

    SigLIP pools its image tokens with it: batch first, a mask [batch * heads, 1, tokens] or none; no attention weights
    are returned.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        width = source.embed_dim
        self.heads, self.head_width = source.num_heads, width // source.num_heads
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        for index, projection in enumerate(self.projections):
            rows = slice(index * width, (index + 1) * width)
            projection.weight = nn.Parameter(source.in_proj_weight[rows].detach().clone())
            projection.bias = nn.Parameter(source.in_proj_bias[rows].detach().clone())
        self.out_proj = nn.Linear(width, width)
        self.out_proj.weight, self.out_proj.bias = source.out_proj.weight, source.out_proj.bias

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        given = zip(self.projections, (query, key, value), strict=True)
        query, key, value = (self._to_heads(projection(tokens)) for projection, tokens in given)
        mask = None if attn_mask is None else attn_mask.unflatten(0, (-1, self.heads))
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, scale=self.head_width**-0.5
        ).transpose(1, 2)
        return self.out_proj(attended.flatten(2)), None

    def _to_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)


def _replace_pooling(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, PoolingAttention(child).eval())


def split(model: PreTrainedModel, inputs: dict[str, tuple[torch.Tensor, ...]]) -> dict[str, nn.Module]:
    """Cut `model` in two. It is not to be used afterwards: its pooling attention is replaced by an equal one.

    Args:
        model: a dual encoder in evaluation mode.
        inputs: example arguments of each tower, by name ("vision", "text").
    """
    _replace_pooling(model)
    towers: dict[str, nn.Module] = {}
    for name, wrap in (("vision", ImageTower), ("text", TextTower)):
        whole: nn.Module = wrap(model)
        used = _children_used(model, partial(whole.__call__, *inputs[name]))
        towers[name] = wrap(_only(model, used)).eval()
    return towers


def example_inputs(model: Model) -> dict[str, tuple[torch.Tensor, ...]]:
    """Two images and two texts of ones, for tracing: shapes matter, values do not.

    Args:
        model: as checkpoint.describe gives it.
    """
    tokens = model.context_length if model.pad_to_context else min(16, model.context_length)
    texts = tuple(torch.ones(2, tokens, dtype=torch.int64) for _ in model.text_inputs)
    return {"vision": (torch.zeros(2, 3, *model.image_size),), "text": texts}


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
