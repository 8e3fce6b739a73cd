"""Drop reshapes that give the shape that is there, and nodes that put a shape together from its own parts."""

import onnx_ir as ir

from clip_deploy.onnx_graph.ir_tools import array, made_by

Size = int | str | tuple[ir.Value, int] | None  # a number, a named size, "as this value's axis", or unknown


def drop_idle_reshapes(model: ir.Model) -> int:
    """Take out every Reshape that cannot change its input's shape, in place; return how many there were.

    That is known where all sizes but one agree: the number of elements leaves the last no choice.
    """
    idle = [node for node in model.graph if node.op_type == "Reshape" and _is_idle(node)]
    for node in idle:
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        model.graph.remove(node, safe=True)
    return len(idle)


def join_shapes(model: ir.Model) -> int:
    """Replace every Concat that puts all sizes of one tensor together again by its Shape, in place; return how many."""
    joined = 0
    for node in list(model.graph):
        source = _whole_shape_of(node) if node.op_type == "Concat" else None
        if source is not None:
            shape = ir.node("Shape", [source])
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [shape], node.outputs, shape.outputs)
            joined += 1
    return joined


def _whole_shape_of(concat: ir.Node) -> ir.Value | None:
    """The tensor all of whose sizes a Concat holds."""
    value = concat.inputs[0]
    while (maker := made_by(value)) and maker.op_type in ("Unsqueeze", "Gather"):
        value = maker.inputs[0]
    source = maker.inputs[0] if maker is not None and maker.op_type == "Shape" else None
    sizes = _joined(concat) if source is not None else None
    return source if source is not None and sizes is not None and sizes == _sizes_of(source) else None


def _is_idle(reshape: ir.Node) -> bool:
    source, output = reshape.inputs[0], reshape.outputs[0]
    wanted = sizes_in(reshape.inputs[1])
    if source is None or wanted is None or output.is_graph_output():
        return False
    given = _sizes_of(source)
    if given is None or len(given) != len(wanted):
        return False
    copied = 0 if reshape.attributes.get_int("allowzero", 0) == 0 else None
    pairs = enumerate(zip(given, wanted, strict=True))
    agreeing = [new in (old, (source, axis)) or (new is not None and new == copied) for axis, (old, new) in pairs]
    return agreeing.count(False) <= 1


def _sizes_of(value: ir.Value) -> list[Size] | None:
    """The sizes of a tensor; None where not even its rank is known."""
    if value.shape is None:
        return None
    known = [size if isinstance(size, int) else size.value for size in value.shape]
    return [(value, axis) if size is None else size for axis, size in enumerate(known)]


def sizes_in(value: ir.Value | None) -> list[Size] | None:
    """The sizes that a vector of integers holds; None where not even their number is known."""
    if value is None:
        return None
    if (content := array(value)) is not None:
        return [int(size) for size in content.reshape(-1)]
    maker = value.producer()
    if maker is None:
        return None
    if maker.op_type == "Shape":
        return _sizes_from(maker)
    if maker.op_type in ("Unsqueeze", "Squeeze", "Cast", "Identity"):
        return sizes_in(maker.inputs[0])
    if maker.op_type == "Concat":
        return _joined(maker)
    return _chosen(maker) if maker.op_type == "Gather" else None


def _sizes_from(shape: ir.Node) -> list[Size] | None:
    whole = _sizes_of(shape.inputs[0]) if shape.inputs[0] is not None else None
    start, end = shape.attributes.get_int("start", 0), shape.attributes.get("end")
    return whole[start : end.as_int() if end is not None else None] if whole is not None else None


def _joined(concat: ir.Node) -> list[Size] | None:
    parts = [sizes_in(part) for part in concat.inputs]
    return None if any(part is None for part in parts) else [size for part in parts if part for size in part]


def _chosen(gather: ir.Node) -> list[Size] | None:
    """The sizes at constant places of others."""
    whole, index = sizes_in(gather.inputs[0]), array(gather.inputs[1])
    return None if whole is None or index is None else [whole[int(place)] for place in index.reshape(-1)]
