import numpy as np
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from support.graphs import kinds, result, written_out
from transformers.activations import ACT2FN

from clip_deploy.rewrites.gelu import fuse_gelu

FORMS = {"gelu": "Gelu", "gelu_python": "Gelu", "quick_gelu": "QuickGelu"} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"), "FastGelu"
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "kind"), FORMS.items())
def test_every_form_that_transformers_has_becomes_one_operator_of_the_same_function(tmp_path, name, kind):
    model = written_out(ACT2FN[name], tmp_path / "gelu.onnx")
    given = np.linspace(-6, 6, 16, dtype=np.float32).reshape(2, 8)
    expected = result(model, given)
    assert fuse_gelu(model) == 1
    RemoveUnusedNodesPass()(model)
    assert kinds(model) == [kind]
    model.opset_imports["com.microsoft"] = 1
    np.testing.assert_allclose(result(model, given), expected, rtol=0, atol=2e-6)


class Gate(torch.nn.Module):
    """x multiplied by a function of x."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return x * self.function(x)


OTHERS = {
    "SiLU": torch.sigmoid,
    "another slope": lambda x: torch.sigmoid(1.8 * x),
    "a gate that is not halved": lambda x: 1 + torch.erf(x / 2**0.5),
    "another argument": lambda x: 0.5 * (1 + torch.erf(x / 2)),
    "another shift": lambda x: 0.5 * (2 + torch.erf(x / 2**0.5)),
    "another tensor": lambda x: 0.5 * (1 + torch.erf(torch.flip(x, [0]) / 2**0.5)),
    "another cube": lambda x: 0.5 * (1 + torch.tanh(0.79788456 * (x + 0.05 * x**3))),
    "a pooler's tanh": torch.tanh,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_gelu_is_left_alone(tmp_path, name):
    model = written_out(Gate(OTHERS[name]), tmp_path / "other.onnx")
    before = kinds(model)
    assert fuse_gelu(model) == 0
    assert kinds(model) == before
