import pytest
import torch

from clip_deploy.checkpoint.load import load_model
from clip_deploy.checkpoint.operations import count_operations
from clip_deploy.checkpoint.towers import example_inputs, split
from clip_deploy.core.artifact import read_target


def test_a_familys_towers_have_the_operations_of_their_architecture(family):
    """Per layer two norms and one each of attention and GELU; what lies around the layers differs."""
    model = read_target(family).model
    around = {  # attention, norms, norms behind a skip connection, GELU, patches, pooled token
        ("clip", "vision"): (0, 2, 0, 0, 1, 1),  # norms before and after the layers; the first two are behind no skip
        ("clip", "text"): (0, 1, 0, 0, 0, 1),
        ("siglip", "vision"): (1, 2, 0, 1, 1, 0),  # a pooling head with attention, norm and MLP
        ("siglip", "text"): (0, 1, 0, 0, 0, 1),
        ("chinese_clip", "vision"): (0, 2, 0, 0, 1, 1),
        ("chinese_clip", "text"): (0, 1, 0, 0, 0, 1),  # a BERT: each norm behind a skip, but that of the embeddings
    }
    inputs = example_inputs(model)
    for name, tower in split(load_model(family), inputs).items():
        layers = model.towers[name].layers
        attention, norms, skips, gelu, patches, pooled = around[model.model_type, name]
        assert count_operations(tower, inputs[name]) == {
            "attention": layers + attention,
            "layer_norm": 2 * layers + norms,
            "skip_layer_norm": 2 * layers + skips,
            "gelu": layers + gelu,
            "patch_embedding": patches,
            "early_pooling": pooled,
        }


class Tower(torch.nn.Module):
    """A linear layer behind a skip connection, with a norm that is used and one that is not."""

    def __init__(self, used):
        super().__init__()
        self.branch = torch.nn.Linear(8, 8)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(8) for _ in range(2))
        self.used = used

    def forward(self, x):
        total = x + self.branch(x)
        found = [norm(total) for norm in self.norms]
        return found[self.used][:, 0]


@pytest.mark.parametrize("used", [0, 1])
def test_what_the_embedding_does_not_need_is_not_counted(used):
    found = count_operations(Tower(used), [torch.zeros(2, 3, 8)])
    assert (found["layer_norm"], found["skip_layer_norm"]) == (1, 1)


@pytest.mark.parametrize(("positions", "skips"), [(torch.ones(2, 3, 8), 1), (torch.ones(1, 3, 8), 0)])
def test_what_is_broadcast_is_no_skip_connection(positions, skips):
    class Broadcast(Tower):
        def forward(self, x):
            return self.norms[0](self.branch(x) + positions)

    assert count_operations(Broadcast(0), [torch.zeros(2, 3, 8)])["skip_layer_norm"] == skips
