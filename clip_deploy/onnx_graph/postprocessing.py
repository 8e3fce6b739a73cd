"""Behind a tower in its graph: embeddings of unit length, and a zero-shot head with its labels baked in."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from clip_deploy.core.artifact import EMBEDS
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.model import Model, embeddings
from clip_deploy.core.similarity import normalized
from clip_deploy.data.preprocessed import tokenize
from clip_deploy.onnx_graph.pre_post import POSTPROCESSING_PREFIX, Nodes, PrePost

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

PROBABILITIES = "probabilities"
MIN_NORM = 1e-12


@dataclass
class Labels:
    """What scores image embeddings as the model itself scores pairs.

    Attributes:
        names: of the labels.
        weights: float32 [dimension, labels], the labels' embeddings of unit length times the model's scale.
        bias: SigLIP's, with which probabilities are sigmoids; None where they are a softmax over the labels (CLIP).
    """

    names: list[str]
    weights: np.ndarray
    bias: float | None


@torch.inference_mode()  # type: ignore[untyped-decorator]
def encode_labels(
    model: "PreTrainedModel", processor: "ProcessorMixin", described: Model, labels: list[str], template: str
) -> Labels:
    """Encode `template` with each label by the model's own text tower.

    Args:
        described: as checkpoint.describe gives it.

    Raises UnavailableError where the model has no scale of its own.
    """
    try:
        scale, bias = logit_scale(model), logit_bias(model)
    except UnavailableError as error:
        raise UnavailableError(f"onnx.classifier: {error}") from error
    texts = tokenize(processor, described, [template.format(label) for label in labels])
    given = {name: torch.from_numpy(getattr(texts, name)) for name in described.text_inputs}
    encoded = normalized(embeddings(model, "get_text_features", **given).numpy())
    weights = np.ascontiguousarray(scale * encoded.T, dtype=np.float32)
    return Labels(labels, weights, bias)


def logit_scale(model: "PreTrainedModel") -> float:
    """What the model multiplies cosines by: exp(logit_scale), or 1 / temperature (ALIGN)."""
    if hasattr(model, "logit_scale"):
        return float(model.logit_scale.detach().exp())
    if hasattr(model, "temperature"):
        return 1 / float(model.temperature.detach())
    raise UnavailableError(f"a {type(model).__name__} has no logit_scale or temperature")


def logit_bias(model: "PreTrainedModel") -> float | None:
    """SigLIP's, with which probabilities are sigmoids; None where they are a softmax over the texts."""
    bias = getattr(model, "logit_bias", None)
    return None if bias is None else float(bias.detach())


def add_postprocessing(pre_post: PrePost, tower: str, normalize: bool, labels: Labels | None) -> None:
    """Add to the post-processing of a tower what its embeddings [batch, dimension] go through."""
    if not normalize and labels is None:
        return
    nodes = Nodes(POSTPROCESSING_PREFIX)
    pre_post.embeds = ir.Value(name="embeds")
    squares = nodes.add("ReduceSum", [nodes.add("Mul", [pre_post.embeds, pre_post.embeds]), nodes.constant([1])])
    norm = nodes.add("Max", [nodes.add("Sqrt", [squares]), nodes.constant(MIN_NORM, np.float32)])
    unit = _typed(nodes.add("Div", [pre_post.embeds, norm]), None)  # attach says the dimension
    pre_post.outputs = {EMBEDS[tower]: unit if normalize else pre_post.embeds}
    if labels is not None:
        logits = nodes.add("MatMul", [unit, nodes.constant(labels.weights, np.float32)])
        if labels.bias is None:
            scores = nodes.add("Softmax", [logits], axis=-1)
        else:
            scores = nodes.add("Sigmoid", [nodes.add("Add", [logits, nodes.constant(labels.bias, np.float32)])])
        pre_post.outputs[PROBABILITIES] = _typed(scores, len(labels.names))
        pre_post.labels = json.dumps(labels.names, ensure_ascii=False)
    pre_post.behind = nodes.made


def _typed(value: ir.Value, columns: int | None) -> ir.Value:
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(["batch", columns])
    return value
