import numpy as np
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from support.graphs import kinds, result, written_out

from clip_deploy.rewrites.skip_layer_norm import fuse_skip_layer_norm


class Block(torch.nn.Module):
    """x + branch(x), normalised, and with `again` added to the sum itself, as the next layer does."""

    def __init__(self, bias, again):
        super().__init__()
        torch.manual_seed(0)
        self.branch = torch.nn.Linear(8, 8, bias=bias)
        self.norm = torch.nn.LayerNorm(8)
        torch.nn.init.normal_(self.norm.weight)
        self.again = again

    def forward(self, x):
        x = x.unsqueeze(0)
        total = self.branch(x) + x
        normed = self.norm(total)
        return total + torch.tanh(normed) if self.again else normed


GIVEN = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_skip_connection_becomes_one_operator_with_the_bias_inside(tmp_path, bias, again):
    model = written_out(Block(bias, again), tmp_path / "block.onnx")
    expected = result(model, GIVEN)
    assert fuse_skip_layer_norm(model) == 1
    RemoveUnusedNodesPass()(model)
    (fused,) = [node for node in model.graph if node.op_type == "SkipLayerNormalization"]
    assert (len(fused.inputs), len(fused.outputs)) == (4 + bias, 4 if again else 1)
    assert kinds(model).count("Add") == again
    model.opset_imports["com.microsoft"] = 1
    np.testing.assert_allclose(result(model, GIVEN), expected, rtol=0, atol=1e-5)


class Positions(torch.nn.Module):
    """Embeddings with a learned position each, normalised."""

    def __init__(self):
        super().__init__()
        self.branch, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)
        self.positions = torch.nn.Parameter(torch.ones(1, 2, 8))

    def forward(self, x):
        return self.norm(self.branch(x.unsqueeze(0)) + self.positions)


@pytest.mark.filterwarnings("ignore")
def test_positions_that_are_added_are_no_skip_connection(tmp_path):
    assert fuse_skip_layer_norm(written_out(Positions(), tmp_path / "positions.onnx")) == 0


class Broadcast(Positions):
    """The same where the positions are computed, so that one addend has two rows and the other one."""

    def forward(self, x):
        return self.norm(self.branch(torch.stack([x, -x])) + x.sin().unsqueeze(0))


@pytest.mark.filterwarnings("ignore")
def test_what_is_broadcast_is_no_skip_connection(tmp_path):
    model = written_out(Broadcast(), tmp_path / "broadcast.onnx")
    assert fuse_skip_layer_norm(model) == 0
