"""Small tools of the rewrites: constants, who made a value, who reads it."""

import numpy as np
import onnx_ir as ir


def initializer(graph: ir.Graph, name: str, content: np.ndarray) -> ir.Value:
    """Add a constant tensor to the graph."""
    value = ir.Value(name=name, const_value=ir.tensor(content, name=name))
    value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
    graph.register_initializer(value)
    return value


def array(value: ir.Value | None) -> np.ndarray | None:
    """The content of a constant, None where the value is computed."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def made_by(value: ir.Value | None) -> ir.Node | None:
    """The node whose output a value is; None for inputs, initializers and no value."""
    return value.producer() if value is not None else None


def only_user(value: ir.Value, *kinds: str) -> ir.Node | None:
    """The one node of these kinds that uses a value, whatever reads its shape besides."""
    users = [use.node for use in value.uses() if use.node.op_type in kinds]
    return users[0] if len(users) == 1 else None


def permutation(node: ir.Node) -> list[int] | None:
    """The `perm` of a Transpose; None of any other node."""
    return list(node.attributes["perm"].as_ints()) if node.op_type == "Transpose" else None
