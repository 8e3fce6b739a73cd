"""Fuse GELU: from the Erf, Tanh or Sigmoid and the arithmetic around it to one Gelu, FastGelu or QuickGelu.

Exporters and models write the same function in many orders: halved before or after, divided by sqrt(2) or multiplied by
its inverse, the cube as Pow or as two products. So the argument is read as a polynomial in x, and the result as a
product of factors; the order does not matter.
"""

from math import pi, sqrt

import numpy as np
import onnx_ir as ir

from clip_deploy.onnx_graph.ir_tools import array
from clip_deploy.onnx_graph.onnx_file import RUNTIME

Polynomial = dict[int, float]  # coefficients by power of x

SLOPE = sqrt(2 / pi)
ERF: Polynomial = {1: 1 / sqrt(2)}
TANH: Polynomial = {1: SLOPE, 3: SLOPE * 0.044715}
SIGMOID: Polynomial = {1: 1.702}
TOLERANCE = 1e-3  # of a coefficient, relative: some exporters round them to half precision
HIGHEST = 3  # power of x


def fuse_gelu(model: ir.Model) -> int:
    """Replace every GELU that is written out, in place; return how many were replaced.

    x/2 (1 + erf(x/sqrt(2))) becomes Gelu, its approximation by tanh FastGelu, x sigmoid(1.702 x) QuickGelu.
    """
    fused = 0
    for node in list(model.graph):
        if made := _gelu(node):
            gelu, last = made
            ir.convenience.replace_nodes_and_values(model.graph, last, [last], [gelu], last.outputs, gelu.outputs)
            fused += 1
    return fused


def _gelu(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The operator for what is written around an Erf, Tanh or Sigmoid, and the last node of that."""
    if node.op_type == "Sigmoid":
        return _around(node, node.outputs[0], 1.0, "QuickGelu", SIGMOID)
    if node.op_type in ("Erf", "Tanh") and (shifted := _plus_one(node.outputs[0])):
        kind, argument = ("Gelu", ERF) if node.op_type == "Erf" else ("FastGelu", TANH)
        return _around(node, shifted, 0.5, kind, argument)
    return None


def _around(
    node: ir.Node, gate: ir.Value, scale: float, kind: str, argument: Polynomial
) -> tuple[ir.Node, ir.Node] | None:
    """The operator, where `gate` is multiplied by x and `scale` and the node's input is that polynomial in x."""
    found = _product_with(gate, scale)
    if found is None:
        return None
    x, last = found
    given = _polynomial(node.inputs[0], x)
    if given is None or not _close(given, argument):
        return None
    attributes = {"alpha": given[1]} if kind == "QuickGelu" else {}
    return ir.node(kind, [x], attributes, domain=RUNTIME), last


def _plus_one(value: ir.Value) -> ir.Value | None:
    """value + 1, where nothing else reads it."""
    add = _only_reader(value, "Add")
    other = _other(add, value) if add is not None else None
    return add.outputs[0] if add is not None and _scalar(other) == 1.0 else None


def _product_with(gate: ir.Value, scale: float) -> tuple[ir.Value, ir.Node] | None:
    """x of the product x * scale * gate, in any order, and the node that ends it."""
    x, factor, last = None, 1.0, None
    while (mul := _only_reader(gate, "Mul")) and (x is None or not np.isclose(factor, scale, rtol=TOLERANCE)):
        other = _other(mul, gate)
        if other is None:  # the gate's square
            return None
        constant = _scalar(other)
        if constant is not None:
            factor *= constant
        elif x is None:
            x = other
        else:
            return None
        gate, last = mul.outputs[0], mul
    if x is None or last is None:
        return None
    if not np.isclose(factor, scale, rtol=TOLERANCE):  # x is halved before it is multiplied
        x, before = _unscaled(x)
        factor *= before
    return (x, last) if np.isclose(factor, scale, rtol=TOLERANCE) else None


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """What a scalar multiplies, and that scalar."""
    maker = value.producer()
    if maker is None or maker.op_type != "Mul":
        return value, 1.0
    for factor, rest in (maker.inputs, maker.inputs[::-1]):
        if rest is not None and (constant := _scalar(factor)) is not None:
            return rest, constant
    return value, 1.0


def _polynomial(value: ir.Value | None, x: ir.Value) -> Polynomial | None:
    """The value as a polynomial in x; None where it is none, or one of a power above HIGHEST."""
    if value is x:
        return {1: 1.0}
    if value is None:
        return None
    if (constant := _scalar(value)) is not None:
        return {0: constant}
    maker = value.producer()
    if maker is None or maker.op_type not in ("Add", "Mul", "Div", "Pow"):
        return None
    first, second = (_polynomial(item, x) for item in maker.inputs)
    return _combined(maker.op_type, first, second) if first is not None and second is not None else None


def _combined(operator: str, first: Polynomial, second: Polynomial) -> Polynomial | None:
    if operator == "Add":
        return {power: first.get(power, 0.0) + second.get(power, 0.0) for power in first | second}
    if operator == "Mul":
        return _product(first, second)
    if set(second) != {0} or second[0] == 0:
        return None
    if operator == "Div":
        return {power: value / second[0] for power, value in first.items()}
    result: Polynomial | None = {0: 1.0}
    for _ in range(int(second[0])):
        result = _product(result, first) if result is not None else None
    return result if second[0] in (2, HIGHEST) else None


def _product(first: Polynomial, second: Polynomial) -> Polynomial | None:
    result: Polynomial = {}
    for power, value in first.items():
        for other, factor in second.items():
            result[power + other] = result.get(power + other, 0.0) + value * factor
    return result if max(result) <= HIGHEST else None


def _close(given: Polynomial, wanted: Polynomial) -> bool:
    return all(
        abs(given.get(power, 0.0) - wanted.get(power, 0.0)) <= TOLERANCE * wanted.get(power, 1e-3)
        for power in given | wanted
    )


def _only_reader(value: ir.Value, kind: str) -> ir.Node | None:
    """The one node of this kind that reads a value, if nothing else does."""
    readers = {use.node for use in value.uses()}
    reader = readers.pop() if len(readers) == 1 else None
    whole = reader is not None and reader.op_type == kind and not value.is_graph_output()
    return reader if whole else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The second operand of a node that reads `value`; None where that is `value` again."""
    others = [item for item in node.inputs if item is not value]
    return others[0] if len(others) == 1 else None


def _scalar(value: ir.Value | None) -> float | None:
    content = array(value)
    return float(content.reshape(())) if content is not None and content.size == 1 else None
