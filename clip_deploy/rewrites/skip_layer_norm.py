"""Fuse skip connections with the LayerNormalization behind them: the addition, and a linear layer's bias, in one node.

The sum itself is still given where the next skip connection reads it.
"""

from dataclasses import dataclass

import onnx_ir as ir

from clip_deploy.onnx_graph.ir_tools import array
from clip_deploy.onnx_graph.onnx_file import RUNTIME

SUM = 3  # which output of SkipLayerNormalization is the sum


@dataclass
class Match:
    """branch (+ bias) + skip, normalised: the branch ends in a product, the skip is what it was computed from."""

    branch: ir.Value
    skip: ir.Value
    bias: ir.Value | None
    addition: ir.Node
    norm: ir.Node


def fuse_skip_layer_norm(model: ir.Model) -> int:
    """Replace every addition with a LayerNormalization behind it, in place; return how many were replaced."""
    fused: set[ir.Node] = set()
    for node in list(model.graph):
        match = _match(node)
        if match and match.addition not in fused:
            _replace(model.graph, match)
            fused.add(match.addition)
    return len(fused)


def _match(norm: ir.Node) -> Match | None:
    if norm.op_type != "LayerNormalization" or len(norm.inputs) < 3 or norm.attributes.get_int("axis", -1) != -1:
        return None
    addition = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if addition is None or addition.op_type != "Add" or not all(map(_is_given, norm.inputs[1:3])):
        return None
    for branch, skip in (addition.inputs, addition.inputs[::-1]):
        product = _matmul_and_bias(branch)
        if product is not None and skip is not None and array(skip) is None and _may_be_equal(branch, skip):
            return Match(product[0], skip, product[1], addition, norm)
    return None


def _is_given(value: ir.Value | None) -> bool:
    """Whether a value is there before any node has run."""
    return value is not None and value.is_initializer()


def _matmul_and_bias(value: ir.Value | None) -> tuple[ir.Value, ir.Value | None] | None:
    """A product with a constant matrix, and the bias that is added to it where nothing else reads their sum."""
    if value is None or (maker := value.producer()) is None:
        return None
    if maker.op_type == "MatMul" and _rank(maker.inputs[1]) == 2:
        return value, None
    if maker.op_type != "Add":
        return None
    for product, bias in (maker.inputs, maker.inputs[::-1]):
        multiply = product.producer() if product is not None else None
        if multiply is None or multiply.op_type != "MatMul" or _rank(multiply.inputs[1]) != 2 or _rank(bias) != 1:
            continue
        alone = len(value.uses()) == 1 and _is_given(bias)
        return (product, bias) if alone and product is not None else (value, None)
    return None


def _rank(value: ir.Value | None) -> int | None:
    """Dimensions of a constant, None where the value is computed."""
    content = array(value)
    return None if content is None else content.ndim


def _may_be_equal(first: ir.Value | None, second: ir.Value) -> bool:
    """Whether no known size of two values differs: what is broadcast is no skip connection."""
    if first is None or first.shape is None or second.shape is None:
        return True
    return len(first.shape) == len(second.shape) and not any(
        isinstance(one, int) and isinstance(other, int) and one != other
        for one, other in zip(first.shape, second.shape, strict=True)
    )


def _replace(graph: ir.Graph, match: Match) -> None:
    """Put the fused node where the addition was: what reads the sum may come before the normalization."""
    total, normalised = match.addition.outputs[0], match.norm.outputs[0]
    inputs = [match.branch, match.skip, *match.norm.inputs[1:3], *([match.bias] if match.bias is not None else [])]
    epsilon = match.norm.attributes.get_float("epsilon", 1e-5)
    read = len(total.uses()) > 1 or total.is_graph_output()
    outputs = SUM + 1 if read else 1
    fused = ir.node("SkipLayerNormalization", inputs, {"epsilon": epsilon}, domain=RUNTIME, num_outputs=outputs)
    graph.insert_before(match.addition, fused)
    pairs = [(normalised, fused.outputs[0])] + ([(total, fused.outputs[SUM])] if read else [])
    for old, new in pairs:
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    for skipped in fused.outputs[1:SUM]:
        skipped.name = ""
    graph.remove([match.norm, match.addition], safe=True)
