"""Fuse LayerNormalization: from the means, the root and the division that exporters below opset 17 write to one node.

ONNX's own operator begins with opset 17; ONNX Runtime runs it in a graph of any.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from clip_deploy.onnx_graph.ir_tools import array

LOST_EPSILON = 1e-12  # BERT's: onnxscript's optimizer takes adding anything below 1e-8 for adding nothing


@dataclass
class Match:
    """(source - mean) / sqrt(variance + epsilon) * weight + bias over the last axis, and the node that ends it."""

    source: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    epsilon: float
    last: ir.Node


def fuse_layer_norm(model: ir.Model) -> int:
    """Replace every LayerNormalization that is written out, in place; return how many were replaced."""
    fused = 0
    for node in list(model.graph):
        if match := _match(node):
            inputs = [match.source, match.weight, *([match.bias] if match.bias is not None else [])]
            norm = ir.node("LayerNormalization", inputs, {"axis": -1, "epsilon": match.epsilon})
            last = match.last
            ir.convenience.replace_nodes_and_values(model.graph, last, [last], [norm], last.outputs, norm.outputs)
            fused += 1
    return fused


def _match(division: ir.Node) -> Match | None:
    """The normalization around a division by a standard deviation."""
    source = _centred_from(division.inputs[0]) if division.op_type == "Div" else None
    epsilon = _epsilon_of(division.inputs[1], division.inputs[0]) if source is not None else None
    scaled = _constant_operand(division.outputs[0], "Mul") if epsilon else None
    if source is None or epsilon is None or scaled is None:
        return None
    last, weight = scaled
    shifted = _constant_operand(last.outputs[0], "Add")
    last, bias = shifted or (last, None)
    return Match(source, weight, bias, epsilon, last)


def _centred_from(value: ir.Value | None) -> ir.Value | None:
    """What a value is, less its mean over the last axis."""
    sub = value.producer() if value is not None else None
    if sub is None or sub.op_type != "Sub" or sub.inputs[0] is None:
        return None
    return sub.inputs[0] if _mean_of(sub.inputs[1]) is sub.inputs[0] else None


def _epsilon_of(deviation: ir.Value | None, centred: ir.Value | None) -> float | None:
    """The epsilon in sqrt(mean(centred ** 2) + epsilon)."""
    root = deviation.producer() if deviation is not None else None
    if root is None or root.op_type != "Sqrt" or root.inputs[0] is None:
        return None
    if _is_square(_mean_of(root.inputs[0]), centred):
        return LOST_EPSILON
    total = root.inputs[0].producer()
    if total is None or total.op_type != "Add":
        return None
    for variance, added in (total.inputs, total.inputs[::-1]):
        epsilon = array(added)
        if epsilon is not None and epsilon.size == 1 and _is_square(_mean_of(variance), centred):
            return float(epsilon.reshape(()))
    return None


def _is_square(value: ir.Value | None, centred: ir.Value | None) -> bool:
    """Whether a value is the square of another, which older exporters compute a second time."""
    maker = value.producer() if value is not None else None
    if maker is None:
        return False
    exponent = array(maker.inputs[1]) if maker.op_type == "Pow" else None
    power = exponent is not None and exponent.size == 1 and float(exponent.reshape(())) == 2
    product = maker.op_type == "Mul" and maker.inputs[0] is maker.inputs[1]
    base = maker.inputs[0]
    same = base is centred or (base is not None and _centred_from(base) is not None is _centred_from(centred))
    return (power or product) and same


def _mean_of(value: ir.Value | None) -> ir.Value | None:
    """What a value is the mean of, over the last axis and with that axis kept."""
    mean = value.producer() if value is not None else None
    if mean is None or mean.op_type != "ReduceMean" or mean.attributes.get_int("keepdims", 1) != 1:
        return None
    given = array(mean.inputs[1]) if len(mean.inputs) > 1 else np.array(mean.attributes.get_ints("axes", []))
    rank = len(mean.inputs[0].shape) if mean.inputs[0] is not None and mean.inputs[0].shape is not None else 0
    last = given is not None and given.tolist() in ([-1], [rank - 1])
    return mean.inputs[0] if last else None


def _constant_operand(value: ir.Value, kind: str) -> tuple[ir.Node, ir.Value] | None:
    """The one node that reads a value, if it is of this kind, and its other operand, a constant vector."""
    readers = [use.node for use in value.uses()]
    if len(readers) != 1 or readers[0].op_type != kind or value.is_graph_output():
        return None
    others = [item for item in readers[0].inputs if item is not value and (_is_vector(item))]
    return (readers[0], others[0]) if len(others) == 1 and others[0] is not None else None


def _is_vector(value: ir.Value | None) -> bool:
    content = array(value)
    return content is not None and content.ndim == 1
