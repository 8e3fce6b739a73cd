"""Patch embedding as a matmul: a convolution whose stride is its kernel cuts the image into patches and projects each.

As MatMul it costs the same in float32, and it is quantised like every other matmul.
"""

import numpy as np
import onnx_ir as ir

from clip_deploy.onnx_graph.ir_tools import array, initializer


def conv_to_matmul(model: ir.Model) -> bool:
    """Replace the convolution that cuts patches by a MatMul, in place; False where there is none."""
    graph = model.graph
    for conv in list(graph):
        size = _fixed_size(conv.inputs[0]) if conv.op_type == "Conv" else None
        weight = array(conv.inputs[1]) if size else None
        if size and weight is not None and (tokens := _tokens(conv, weight)):
            _replace(graph, conv, tokens, weight, size)
            return True
    return False


def _fixed_size(image: ir.Value | None) -> tuple[int, int] | None:
    """Height and width of [batch, channels, height, width], where both are known."""
    sizes = list(image.shape[2:]) if image is not None and image.shape is not None else []
    known = [size for size in sizes if isinstance(size, int)]
    return (known[0], known[1]) if len(known) == len(sizes) == 2 else None


def _tokens(conv: ir.Node, weight: np.ndarray) -> ir.Node | None:
    """The Transpose that gives [batch, patches, width], if this convolution does nothing but cut patches."""
    settings = conv.attributes
    plain = not any(settings.get_ints("pads", [0])) and set(settings.get_ints("dilations", [1])) == {1}
    cut = list(settings.get_ints("strides", [])) == list(weight.shape[2:]) and settings.get_int("group", 1) == 1
    if not cut or not plain:
        return None
    reshape = _user(conv, "Reshape")
    transpose = _user(reshape, "Transpose") if reshape is not None else None
    if transpose is None or list(transpose.attributes.get_ints("perm", [])) != [0, 2, 1]:
        return None
    return transpose


def _user(node: ir.Node, kind: str) -> ir.Node | None:
    users = [use.node for use in node.outputs[0].uses()]
    chosen = [user for user in users if user.op_type == kind]
    return chosen[0] if len(chosen) == 1 and all(user.op_type in (kind, "Shape") for user in users) else None


def _replace(graph: ir.Graph, conv: ir.Node, tokens: ir.Node, weight: np.ndarray, size: tuple[int, int]) -> None:
    width, channels, tall, wide = weight.shape
    rows, columns = size[0] // tall, size[1] // wide
    shapes = {
        "grid": [-1, channels, rows, tall, columns, wide],
        "patches": [-1, rows * columns, channels * tall * wide],
    }
    constants = {name: initializer(graph, f"patch_{name}", np.array(shape)) for name, shape in shapes.items()}
    matmul = initializer(graph, "patch_weight", np.ascontiguousarray(weight.reshape(width, -1).T))
    grid = ir.node("Reshape", [conv.inputs[0], constants["grid"]])
    cut = ir.node("Transpose", [grid.outputs[0]], {"perm": [0, 2, 4, 1, 3, 5]})
    patches = ir.node("Reshape", [cut.outputs[0], constants["patches"]])
    nodes = [grid, cut, patches, ir.node("MatMul", [patches.outputs[0], matmul])]
    if len(conv.inputs) > 2:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], conv.inputs[2]]))
    for node in nodes:
        node.outputs[0].name = f"patch_{node.op_type}_{nodes.index(node)}"
    graph.insert_before(conv, nodes)
    ir.convenience.replace_all_uses_with(tokens.outputs[0], nodes[-1].outputs[0])
