"""Attention of PyTorch, timm and open_clip as most of transformers' layers compute it: exporters write one pattern.

The pattern is three projections, heads as an axis, scaled_dot_product_attention, and a projection of its rows.
What is below the attentions is written otherwise for exporters' sake: a Linear that can be quantised, a mask of few
operations, embeddings without a loop over images.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

Projection = tuple[torch.Tensor, torch.Tensor | None]  # weight [out, in] and bias [out]


class PlainAttention(nn.Module):  # type: ignore[misc]
    """Attention from three projections of rows [batch, tokens, width]; no attention weights are returned.

    Args:
        projections: of query, key and value.
        out_proj: what the attended rows go through.
        norms: of the heads of query and key.
        half: of a rotation, whether a head's halves are its pairs, and not its neighbours.
    """

    def __init__(
        self,
        projections: list[Projection],
        out_proj: nn.Module,
        heads: int,
        norms: tuple[nn.Module, nn.Module] | None = None,
        half: bool = False,
    ) -> None:
        super().__init__()
        self.half = half
        self.heads, self.head_width = heads, len(projections[0][0]) // heads
        self.projections = nn.ModuleList(_linear(*projection) for projection in projections)
        self.norms = nn.ModuleList(norms or (nn.Identity(), nn.Identity()))
        self.out_proj = out_proj

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        rotation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            mask: is added to the scores, [batch, heads, queries, keys] or broadcast to it.
            rotation: sines and cosines that queries and keys are turned by, [tokens, heads or 1, 2 * head width].
        """
        given = zip(self.projections, (query, key, value), strict=True)
        queries, keys, values = (self._to_heads(projection(tokens)) for projection, tokens in given)
        queries, keys = self.norms[0](queries), self.norms[1](keys)
        if rotation is not None:
            queries, keys = (_turned(heads, rotation, self.half) for heads in (queries, keys))
        queries, keys, values = (heads.transpose(1, 2) for heads in (queries, keys, values))
        attended = scaled_dot_product_attention(queries, keys, values, mask, scale=self.head_width**-0.5)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _to_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.reshape(*tokens.shape[:2], self.heads, self.head_width)


def _turned(heads: torch.Tensor, rotation: torch.Tensor, half: bool) -> torch.Tensor:
    """Each pair of a head's values, turned by its angle: heads [batch, tokens, heads, head width]."""
    sines, cosines = rotation.chunk(2, -1)
    if half:
        first, second = heads.chunk(2, -1)
        across = torch.cat([-second, first], -1)
    else:
        across = torch.stack([-heads[..., 1::2], heads[..., ::2]], -1).flatten(-2)
    return (heads * cosines + across * sines).to(heads.dtype)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    made = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


class MultiheadAttention(nn.Module):  # type: ignore[misc]
    """nn.MultiheadAttention, batch first, without attention weights.

    Its mask is [queries, keys] or [batch * heads, queries, keys]; None for none.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        weights = [source.q_proj_weight, source.k_proj_weight, source.v_proj_weight]
        if source.in_proj_weight is not None:
            weights = source.in_proj_weight.chunk(3)
        biases = [None] * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        projections = list(zip(weights, biases, strict=True))
        out_proj = _linear(source.out_proj.weight, source.out_proj.bias)  # its own kind is never quantised
        self.plain = PlainAttention(projections, out_proj, source.num_heads)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        mask = attn_mask
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.plain.heads))
        return self.plain(query, key, value, mask), None


class TimmAttention(nn.Module):  # type: ignore[misc]
    """timm's Attention, whose one Linear projects query, key and value, in evaluation mode."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        out = nn.Sequential(source.norm, source.proj)
        self.plain = PlainAttention(_parts(source.qkv, 3), out, source.num_heads, (source.q_norm, source.k_norm))

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        return self.plain(x, x, x, attn_mask)


class TimmRotary(nn.Module):  # type: ignore[misc]
    """timm's EvaAttention and AttentionRope, which turn queries and keys by their positions, in evaluation mode."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        out, norms = nn.Sequential(source.norm, source.proj), (source.q_norm, source.k_norm)
        self.prefix = source.num_prefix_tokens  # tokens without a position, which stand first
        self.plain = PlainAttention(_projections(source), out, source.num_heads, norms, source.rotate_half)

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        return self.plain(x, x, x, attn_mask, None if rope is None else self._rotation(rope))

    def _rotation(self, rope: torch.Tensor) -> torch.Tensor:
        """Of all tokens, from that of [positions, 2 * head width] or [heads, positions, 2 * head width]."""
        rotation = rope[:, None] if rope.dim() == 2 else rope.transpose(0, 1)
        sines, cosines = rotation[:1].chunk(2, -1)
        still = torch.cat([torch.zeros_like(sines), torch.ones_like(cosines)], -1)
        return torch.cat([still.expand(self.prefix, -1, -1), rotation])


class TimmPoolLatent(nn.Module):  # type: ignore[misc]
    """timm's AttentionPoolLatent, which SigLIP pools its image tokens with, in evaluation mode."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source
        projections = [(source.q.weight, source.q.bias), *_parts(source.kv, 2)]
        self.plain = PlainAttention(projections, source.proj, source.num_heads, (source.q_norm, source.k_norm))

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        source = self.source
        if source.pos_embed is not None:
            x = x + source.pos_embed.unsqueeze(0).to(x.dtype)
        x = self.plain(source.latent.expand(x.shape[0], -1, -1), x, x, attn_mask)
        if source.mlp is not None:
            x = x + source.mlp(source.norm(x))
        pooled = {"token": lambda: x[:, 0], "avg": lambda: x.mean(1)}
        return pooled[source.pool]() if source.pool in pooled else x


class FastVitAttention(nn.Module):  # type: ignore[misc]
    """timm's Attention of a FastViT, between maps [batch, width, height, width of the map], in evaluation mode."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.plain = PlainAttention(_parts(source.qkv, 3), source.proj, source.num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.plain(tokens, tokens, tokens).transpose(1, 2).reshape(x.shape)


class ResNetPool(nn.Module):  # type: ignore[misc]
    """open_clip's AttentionPool2d, of which only the first token's row is kept."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        projections = [(part.weight, part.bias) for part in (source.q_proj, source.k_proj, source.v_proj)]
        self.positional_embedding = source.positional_embedding
        self.plain = PlainAttention(projections, source.c_proj, source.num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positional_embedding.to(x.dtype)
        return self.plain(tokens[:, :1], tokens, tokens)[:, 0]


class NaflexEmbeddings(nn.Module):  # type: ignore[misc]
    """SigLIP 2 NaFlex's embeddings of patches, whose table of positions is resized to each image by one matmul.

    transformers calls F.interpolate (bilinear, antialias) for one image after the other. Its weights are triangles over
    the table's rows and columns: a patch's position is their outer product times the table.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.patch_embedding, self.position_embedding = source.patch_embedding, source.position_embedding
        self.side = source.position_embedding_size

    def forward(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor) -> torch.Tensor:
        """[batch, patches, values] and [batch, rows and columns] -> [batch, patches, width]."""
        table = self.position_embedding.weight
        rows, columns = spatial_shapes[:, :1], spatial_shapes[:, 1:]
        patch = torch.arange(pixel_values.shape[1], device=pixel_values.device)[None]
        patch = torch.where(patch <= rows * columns - 1, patch, 0)  # padding has the first one's position, as there
        row = ((patch + 0.5) / columns).floor().to(torch.int64)
        by_row = self._weights(row, rows, table.dtype)[:, :, :, None]
        by_column = self._weights(patch - row * columns, columns, table.dtype)[:, :, None]
        return self.patch_embedding(pixel_values.to(table.dtype)) + (by_row * by_column).flatten(2) @ table

    def _weights(self, index: torch.Tensor, size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Of the table's positions along an axis, at `index` [batch, patches] of `size` [batch, 1].

        In whole numbers up to the division, so that half precision rounds the weights alone: distances are in units of
        1 / (2 * size) of a position, the triangle reaches as far as the longer of both sides.
        """
        positions = torch.arange(1, 2 * self.side, 2, device=index.device)[None, None]
        distance = (positions * size[:, :, None] - (2 * index + 1)[:, :, None] * self.side).abs()
        triangle = (2 * size.clamp(min=self.side)[:, :, None] - distance).clamp(min=0)
        return triangle.to(dtype) / triangle.sum(-1, keepdim=True).to(dtype)


class BlipAttention(nn.Module):  # type: ignore[misc]
    """transformers' attention of BLIP's image tower, in evaluation mode."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.plain = PlainAttention(_parts(source.qkv, 3), source.projection, source.num_heads)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.plain(hidden_states, hidden_states, hidden_states), None


class GroupVitAttention(nn.Module):  # type: ignore[misc]
    """transformers' attention of GroupViT, in evaluation mode; its mask is added to the scores."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        projections = [(part.weight, part.bias) for part in (source.q_proj, source.k_proj, source.v_proj)]
        self.plain = PlainAttention(projections, source.out_proj, source.num_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return self.plain(hidden_states, keys, keys, attention_mask), None


class ProjectedText(nn.Module):  # type: ignore[misc]
    """open_clip's TextTransformer, its last Linear behind it: it asks for nn.Linear, which a quantised one is not."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source, self.projection = source, source.text_projection
        source.text_projection = None

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.projection(self.source(text))


class MaskedText(nn.Module):  # type: ignore[misc]
    """open_clip's HFTextEncoder, which masks padding: transformers itself gathers its mask token by token."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        source = self.source
        seen = text != source.config.pad_token_id
        dtype = next(source.parameters()).dtype
        mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None, None]
        found = source.transformer(input_ids=text, attention_mask=mask.expand(-1, 1, text.shape[1], -1))
        return source.proj(source.pooler(found, seen.long()))


def _parts(linear: nn.Linear, count: int) -> list[Projection]:
    biases = [None] * count if linear.bias is None else linear.bias.chunk(count)
    return list(zip(linear.weight.chunk(count), biases, strict=True))


def _projections(source: nn.Module) -> list[Projection]:
    """Of query, key and value: in three Linears, or in one whose bias may stand apart from it."""
    if source.qkv is None:
        return [(part.weight, part.bias) for part in (source.q_proj, source.k_proj, source.v_proj)]
    if getattr(source, "q_bias", None) is None:
        return _parts(source.qkv, 3)
    return list(zip(source.qkv.weight.chunk(3), (source.q_bias, None, source.v_bias), strict=True))


def _is_plain_rotary(module: nn.Module) -> bool:
    return getattr(module, "gate", None) is None and getattr(module, "num_kv_groups", 1) == 1


def _is_plain_timm(module: nn.Module) -> bool:
    return getattr(module, "gate", None) is None and isinstance(module.qkv, nn.Linear)


def _is_plain_pool(module: nn.Module) -> bool:
    return isinstance(module.q, nn.Linear)


Forms = dict[str, tuple[Callable[[nn.Module], bool], type[nn.Module]]]  # by where the class is written

WITHOUT_LOOPS: Forms = {
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionEmbeddings": (lambda module: True, NaflexEmbeddings),
}
FORMS: Forms = {
    "torch.nn.modules.activation.MultiheadAttention": (lambda module: module.batch_first, MultiheadAttention),
    "timm.layers.attention.Attention": (_is_plain_timm, TimmAttention),
    "timm.layers.attention.AttentionRope": (_is_plain_rotary, TimmRotary),
    "timm.models.eva.EvaAttention": (_is_plain_rotary, TimmRotary),
    "timm.layers.attention_pool.AttentionPoolLatent": (_is_plain_pool, TimmPoolLatent),
    "timm.models.fastvit.Attention": (lambda module: isinstance(module.qkv, nn.Linear), FastVitAttention),
    "open_clip.modified_resnet.AttentionPool2d": (lambda module: True, ResNetPool),
    "transformers.models.blip.modeling_blip.BlipAttention": (lambda module: True, BlipAttention),
    "transformers.models.groupvit.modeling_groupvit.GroupViTAttention": (lambda module: True, GroupVitAttention),
    "open_clip.hf_model.HFTextEncoder": (lambda module: True, MaskedText),
    "open_clip.transformer.TextTransformer": (
        lambda module: isinstance(module.text_projection, nn.Linear),
        ProjectedText,
    ),
    **WITHOUT_LOOPS,
}


def replace_modules(model: nn.Module, forms: Forms = FORMS) -> None:
    """Put an equal module in the place of each one in `model` that exporters would write in another form, or not."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            fits, form = forms.get(f"{type(child).__module__}.{type(child).__qualname__}", (None, None))
            if fits is not None and form is not None and fits(child):
                setattr(module, name, form(child).eval())
