import numpy as np
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from support.graphs import kinds, result, written_out

from clip_deploy.rewrites.layer_norm import fuse_layer_norm


class WrittenOut(torch.nn.Module):
    """Layer normalization in a form of its own."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 2, 8))
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x):
        return self.form(x) * self.weight + self.bias


def centred(x):
    return x - x.mean(-1, keepdim=True)


KNOWN = {
    "power": lambda x: centred(x) / torch.sqrt((centred(x) ** 2).mean(-1, keepdim=True) + 1e-5),
    "product": lambda x: (c := centred(x)) / torch.sqrt((c * c).mean(-1, keepdim=True) + 1e-5),
    "epsilon first": lambda x: (c := centred(x)) / torch.sqrt(1e-5 + (c**2).mean(-1, keepdim=True)),
    "no epsilon": lambda x: (c := centred(x)) / torch.sqrt((c**2).mean(-1, keepdim=True)),
}
UNKNOWN = {
    "over rows": lambda x: (c := x - x.mean(0, keepdim=True)) / torch.sqrt((c**2).mean(0, keepdim=True) + 1e-5),
    "not centred": lambda x: x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5),
    "another power": lambda x: (c := centred(x)) / torch.sqrt((c**4).mean(-1, keepdim=True) + 1e-5),
}
GIVEN = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KNOWN)
def test_a_layer_norm_from_its_parts_becomes_one_operator_of_the_same_values(tmp_path, name):
    model = written_out(WrittenOut(KNOWN[name]), tmp_path / "norm.onnx")
    expected = result(model, GIVEN)
    assert fuse_layer_norm(model) == 1
    RemoveUnusedNodesPass()(model)
    assert kinds(model) == ["LayerNormalization"]
    np.testing.assert_allclose(result(model, GIVEN), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_no_layer_norm_is_left_alone(tmp_path, name):
    model = written_out(WrittenOut(UNKNOWN[name]), tmp_path / "other.onnx")
    assert fuse_layer_norm(model) == 0
    assert "LayerNormalization" not in kinds(model)
