"""Attention in its plain form, held against the library that wrote it, and what fusion makes of it."""

import numpy as np
import pytest
import torch
from support.open_clip import need_library
from torch import nn
from torch.export import Dim

from clip_deploy.builders.onnx_export import WRITERS
from clip_deploy.checkpoint.plain_modules import replace_modules
from clip_deploy.core.config import OnnxConfig, OptimizeConfig
from clip_deploy.core.model import TowerShape
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.rewrites.fusion import fuse, rewrites_of


@pytest.fixture(scope="module", autouse=True)
def library():
    need_library()


WIDTH, HEADS, TOKENS = 32, 4, 9
NORMED = {"norm_layer": nn.LayerNorm, "qk_norm": True, "scale_norm": True}
ROTARY = {  # by name: the class, its settings, and whether each head has angles of its own
    "eva": ("EvaAttention", {"scale_norm": False}, False),
    "eva-three-projections": ("EvaAttention", {"scale_norm": False, "qkv_fused": False}, False),
    "eva-normed": ("EvaAttention", NORMED, False),
    "rope": ("AttentionRope", {}, False),
    "rope-halves": ("AttentionRope", {"rotate_half": True, "qkv_fused": False, "num_prefix_tokens": 0}, False),
    "rope-normed": ("AttentionRope", {**NORMED, "num_prefix_tokens": 3}, False),
    "rope-mixed": ("AttentionRope", {}, True),
}


class Tower(nn.Module):
    """One attention over tokens [batch, 9, 32]."""

    def __init__(self, attention, rope):
        super().__init__()
        self.attention = attention
        self.register_buffer("rope", rope)

    def forward(self, tokens):
        return self.attention(tokens, rope=self.rope)


def rotary(name):
    from timm.layers.attention import AttentionRope
    from timm.models.eva import EvaAttention

    kind, settings, each = ROTARY[name]
    torch.manual_seed(0)
    attention = {"EvaAttention": EvaAttention, "AttentionRope": AttentionRope}[kind](WIDTH, HEADS, **settings)
    for weight in attention.parameters():
        nn.init.normal_(weight, std=0.5)
    positions = TOKENS - attention.num_prefix_tokens
    angles = torch.rand(*([HEADS] if each else []), positions, WIDTH // HEADS)
    return Tower(attention, torch.cat([angles.sin(), angles.cos()], -1)).eval()


@pytest.mark.parametrize("name", ROTARY)
def test_the_plain_form_of_rotary_attention_is_timms_own(name):
    tower, tokens = rotary(name), torch.randn(3, TOKENS, WIDTH)
    with torch.inference_mode():
        expected, unturned = tower(tokens), tower.attention(tokens)
        replace_modules(tower)
        assert type(tower.attention).__name__ == "TimmRotary"
        torch.testing.assert_close(tower(tokens), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tower.attention(tokens), unturned, rtol=1e-5, atol=1e-5)
    assert (expected - unturned).abs().max() > 0.01


@pytest.mark.parametrize("settings", [{"gated": True}, {"num_kv_heads": 2, "qkv_fused": False}])
def test_an_attention_of_another_kind_is_left_as_it_is(settings):
    from timm.layers.attention import AttentionRope

    tower = Tower(AttentionRope(WIDTH, HEADS, **settings), torch.zeros(1))
    replace_modules(tower)
    assert isinstance(tower.attention, AttentionRope)


@pytest.mark.parametrize("opset", [17, 18, 23])  # of both exporters, and ONNX's own Attention
@pytest.mark.parametrize("name", ["rope-halves", "rope-normed"])
def test_rotary_attention_becomes_one_node(name, opset, tmp_path):
    tower, tokens = rotary(name), torch.randn(2, TOKENS, WIDTH)
    with torch.inference_mode():
        expected = tower(tokens).numpy()
    replace_modules(tower)
    exported, fused = tmp_path / "exported.onnx", tmp_path / "fused.onnx"
    write = WRITERS[OnnxConfig(opset=opset).writer]
    write(tower, (tokens,), exported, ["tokens"], "embeds", {0: Dim("batch")}, opset)
    made = fuse(exported, fused, rewrites_of(TowerShape(0, 0, 0), OptimizeConfig()), {})
    assert (made.undone, made.found["attention"]) == ([], 1)
    np.testing.assert_allclose(onnx_file.run(fused, {"tokens": tokens.numpy()}), expected, rtol=1e-4, atol=1e-4)
