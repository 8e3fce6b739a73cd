"""Fuse attention: from the MatMul, Softmax and MatMul that any exporter writes to one MultiHeadAttention.

Query, key and value of one input are projected by one packed MatMul in front of it, so that they stay MatMul
nodes, which every quantiser knows. (com.microsoft.Attention holds its matmul inside: it stays in float32 when a graph
is quantised, and where it does not, QAttention is slower.) ONNX Runtime's own fusions find no attention of transformers
5, onnxscript's only those of the dynamo exporter.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from clip_deploy.onnx_graph.ir_tools import array, initializer, made_by, only_user, permutation
from clip_deploy.onnx_graph.onnx_file import RUNTIME
from clip_deploy.rewrites.reshapes import sizes_in

PADDING_MASKS = ("attention_mask", "pixel_attention_mask")  # of tokens, and of SigLIP 2 NaFlex's patches


@dataclass
class Match:
    """One attention: its heads, its input tensors [batch, sequence, width], and the value that it replaces."""

    heads: int
    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    scale: float
    output: ir.Value


def fuse_attention(model: ir.Model, heads: int, packed: bool = True) -> int:
    """Replace every attention of a tower, in place; return how many were replaced.

    Args:
        heads: the tower's, for an attention whose own the graph does not tell; 0 where layers differ.
        packed: with one matmul for query, key and value where all three read one input.
    """
    fused = 0
    for node in list(model.graph):
        match = _match(node)
        if match is not None and (match.heads or heads):
            _replace(model.graph, match, match.heads or heads, packed)
            fused += 1
    return fused


def replace_masks(model: ir.Model, causal: bool, padding: bool = True) -> bool:
    """Let each attention derive its mask from the tower's mask of padding, in place of the nodes that compute one.

    Args:
        causal: whether tokens see only those before them.
        padding: whether padding is masked at all; needless where texts are padded behind the token that is pooled and
            no token sees those behind it, and a GPU's fastest kernels take no such mask.

    Returns:
        Whether there was a mask to replace. That the graph gives what it gave is for the caller to check.
    """
    graph = model.graph
    masked = [node for node in graph if node.op_type == "MultiHeadAttention" and len(node.inputs) > 5]
    given = next((value for value in graph.inputs if value.name in PADDING_MASKS), None)
    if not masked:
        return False
    mask = None
    if given is not None and padding:
        cast = ir.node("Cast", [given], {"to": ir.DataType.INT32})
        cast.outputs[0].name = "key_padding_mask"
        graph.insert_before(graph[0], cast)
        mask = cast.outputs[0]
    for node in masked:
        node.replace_input_with(5, None)
        node.replace_input_with(4, mask)
        if causal:
            node.attributes["unidirectional"] = ir.AttrInt64("unidirectional", 1)
    return True


def fuse_packed_attention(model: ir.Model) -> bool:
    """Let each attention hold its packed matmul: com.microsoft.Attention for MatMul, Split and MultiHeadAttention.

    On a GPU that spares copying the matmul's three parts; on a CPU, and for INT8, it is the slower form.
    """
    graph = model.graph
    found = [(node, held) for node in graph if (held := _packed_matmul(node)) is not None]
    for node, (matmul, split) in found:
        mask, added = ([*node.inputs, *[None] * 3])[4:6]
        attention = ir.Node(
            RUNTIME,
            "Attention",
            [matmul.inputs[0], matmul.inputs[1], node.inputs[3], mask, None, added],
            node.attributes.values(),
            name=node.name,
        )
        attention.outputs[0].name = f"{node.outputs[0].name}_packed"
        ir.convenience.replace_nodes_and_values(graph, node, [node], [attention], node.outputs, attention.outputs)
        graph.remove([split, matmul], safe=True)
    return bool(found)


def _packed_matmul(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The MatMul and the Split that give an attention its three inputs, and nothing else."""
    if node.op_type != "MultiHeadAttention" or len(node.inputs) < 4 or node.inputs[3] is None:
        return None
    split = made_by(node.inputs[0])
    matmul = made_by(split.inputs[0]) if split is not None and split.op_type == "Split" else None
    if split is None or matmul is None or matmul.op_type != "MatMul" or list(node.inputs[:3]) != list(split.outputs):
        return None
    return (matmul, split) if all(len(value.uses()) == 1 for value in (*split.outputs, *matmul.outputs)) else None


def _match(node: ir.Node) -> Match | None:
    """The attention around a Softmax, or ONNX's own Attention (opset 23)."""
    if node.op_type == "Softmax":
        return _match_softmax(node)
    if node.op_type == "Attention" and node.domain == "" and len(node.outputs) == 1:
        return _match_standard(node)
    return None


def _match_softmax(softmax: ir.Node) -> Match | None:
    probabilities = _without_nan_guard(softmax.outputs[0])
    matmul = only_user(probabilities, "MatMul")
    if matmul is None or matmul.inputs[0] is not probabilities:
        return None
    scores, mask = _split_mask(made_by(softmax.inputs[0]))
    scores, scale = _split_scale(scores)
    if scores is None or scores.op_type != "MatMul":
        return None
    query, query_scale = _split_scale(made_by(scores.inputs[0]))
    key, key_scale = _split_scale(made_by(scores.inputs[1]))
    queries = _from_heads(query) or _from_constant_heads(scores.inputs[0])
    tokens = (queries, _from_transposed_heads(key), _from_heads(made_by(matmul.inputs[1])))
    whole_scale = scale * query_scale * key_scale
    return _whole(_heads(matmul.inputs[1]), tokens, mask, whole_scale, _to_tokens(matmul.outputs[0]))


def _match_standard(attention: ir.Node) -> Match | None:
    settings = attention.attributes
    if settings.get_int("is_causal", 0):
        return None
    mask = attention.inputs[3] if len(attention.inputs) > 3 else None
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        mask = _additive(mask)
    query, key, value = (_from_heads(made_by(item)) for item in attention.inputs[:3])
    scale, output = settings.get_float("scale", 0.0), _to_tokens(attention.outputs[0])
    return _whole(_heads(attention.inputs[2]), (query, key, value), mask, scale, output)


def _heads(values: ir.Value | None) -> int:
    """Of values [batch, heads, sequence, head width]; 0 where the graph does not tell.

    It tells by the shape, or by the sizes that a Reshape is given: values are split into heads and nothing else.
    """
    shape, reshape = values.shape if values is not None else None, _reshape_behind(values)
    sizes = sizes_in(reshape.inputs[1]) if reshape is not None else None
    told = [shape[1]] if shape is not None and len(shape) == 4 else []
    told += [sizes[2]] if sizes is not None and len(sizes) == 4 else []
    return next((size for size in told if isinstance(size, int) and size > 0), 0)


def _reshape_behind(heads: ir.Value | None) -> ir.Node | None:
    transpose = made_by(heads)
    reshape = made_by(transpose.inputs[0]) if transpose is not None and transpose.inputs else None
    return reshape if reshape is not None and reshape.op_type == "Reshape" else None


def _whole(
    heads: int,
    tokens: tuple[ir.Value | None, ir.Value | None, ir.Value | None],
    mask: ir.Value | None,
    scale: float,
    output: ir.Value | None,
) -> Match | None:
    query, key, value = tokens
    if query is None or key is None or value is None or output is None:
        return None
    return Match(heads, query, key, value, mask, scale, output)


def _additive(mask: ir.Value) -> ir.Value:
    """0 where a boolean mask allows, the lowest float32 where it does not; one node for all layers."""
    if made := only_user(mask, "Where"):
        return made.outputs[0]
    maker, graph = made_by(mask), mask.graph
    if maker is None or graph is None:
        return mask  # a graph's input, which no exporter writes
    allowed = initializer(graph, f"{mask.name}_allowed", np.array(0, np.float32))
    forbidden = initializer(graph, f"{mask.name}_forbidden", np.array(np.finfo(np.float32).min))
    node = ir.node("Where", [mask, allowed, forbidden])
    node.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_after(maker, node)
    return node.outputs[0]


def _replace(graph: ir.Graph, match: Match, heads: int, packed: bool) -> None:
    last = made_by(match.output)
    assert last is not None  # _to_rows gave it
    attributes: dict[str, int | float] = {"num_heads": heads}
    if match.scale:
        attributes["scale"] = match.scale
    inputs = (_pack(graph, last, match) if packed else None) or [match.query, match.key, match.value]
    if match.mask is not None:
        inputs = [*inputs, *[None] * (5 - len(inputs)), match.mask]
    node = ir.node("MultiHeadAttention", inputs, attributes, domain=RUNTIME)
    node.outputs[0].name = f"{match.output.name}_attention"
    graph.insert_before(last, node)
    ir.convenience.replace_all_uses_with(match.output, node.outputs[0])


def _pack(graph: ir.Graph, before: ir.Node, match: Match) -> list[ir.Value | None] | None:
    """One MatMul for query, key and value where all three are projections of one input."""
    found = [_projection(value) for value in (match.query, match.key, match.value)]
    projections = [projection for projection in found if projection is not None]
    if len(projections) < 3 or len({source for source, _, _ in projections}) > 1:
        return None
    sources, weights, biases = zip(*projections, strict=True)
    name = match.output.name
    widths = [weight.shape[1] for weight in weights]
    packed = ir.node("MatMul", [sources[0], initializer(graph, f"{name}_qkv", np.concatenate(weights, axis=1))])
    sizes = initializer(graph, f"{name}_widths", np.array(widths, dtype=np.int64))
    parts = ir.node("Split", [packed.outputs[0], sizes], {"axis": -1}, num_outputs=3)
    for value, suffix in zip([*packed.outputs, *parts.outputs], ("qkv_product", "q", "k", "v"), strict=True):
        value.name = f"{name}_{suffix}"
    graph.insert_before(before, [packed, parts])
    return [*parts.outputs, initializer(graph, f"{name}_bias", np.concatenate(biases))]


def _projection(value: ir.Value) -> tuple[ir.Value, np.ndarray, np.ndarray] | None:
    """Input, weight [in, out] and bias [out] of a linear layer."""
    node = made_by(value)
    if node is None:
        return None
    bias, matmul = None, node
    if node.op_type == "Add":
        constants = [item for item in node.inputs if array(item) is not None]
        others = [item for item in node.inputs if array(item) is None]
        if len(constants) != 1:
            return None
        bias, matmul = array(constants[0]), made_by(others[0])
    if matmul is None or matmul.op_type != "MatMul" or matmul.inputs[0] is None:
        return None
    weight = array(matmul.inputs[1])
    if weight is None or weight.ndim != 2 or (bias is not None and bias.ndim != 1):
        return None
    return matmul.inputs[0], weight, np.zeros(weight.shape[1], weight.dtype) if bias is None else bias


def _from_heads(node: ir.Node | None) -> ir.Value | None:
    """The [batch, sequence, width] behind [batch, heads, sequence, head width]."""
    return _joined(node.inputs[0]) if node is not None and permutation(node) == [0, 2, 1, 3] else None


def _joined(heads: ir.Value | None) -> ir.Value | None:
    """[batch, sequence, width] of [batch, sequence, heads, head width].

    Heads that are normalised or turned by their positions are joined by a Reshape, which is added.
    """
    maker = made_by(heads)
    if heads is None or maker is None or maker.graph is None:
        return None
    if maker.op_type == "Reshape" and maker.inputs[0] is not None and len(maker.inputs[0].shape or ()) in (0, 3):
        return maker.inputs[0]
    shape = initializer(maker.graph, f"{heads.name}_joined_shape", np.array([0, 0, -1]))
    joined = ir.node("Reshape", [heads, shape])
    joined.outputs[0].name = f"{heads.name}_joined"
    maker.graph.insert_after(maker, joined)
    return joined.outputs[0]


def _from_constant_heads(value: ir.Value | None) -> ir.Value | None:
    """The same where the query is a constant: a learned probe at a fixed batch size."""
    heads = array(value)
    if value is None or value.graph is None or heads is None or heads.ndim != 4:
        return None
    batch, _, sequence, _ = heads.shape
    tokens = heads.transpose(0, 2, 1, 3).reshape(batch, sequence, -1)
    return initializer(value.graph, f"{value.name}_rows", np.ascontiguousarray(tokens))


def _from_transposed_heads(node: ir.Node | None) -> ir.Value | None:
    """The [batch, sequence, width] behind [batch, heads, head width, sequence], as the exporters transpose it."""
    if node is None:
        return None
    if permutation(node) == [0, 2, 3, 1]:  # TorchScript exporter
        return _joined(node.inputs[0])
    if permutation(node) == [0, 1, 3, 2]:
        return _from_heads(made_by(node.inputs[0]))
    if node.op_type == "Reshape":  # dynamo exporter: heads and batch are one axis while it transposes
        swapped = made_by(node.inputs[0])
        if swapped is not None and permutation(swapped) == [0, 2, 1]:
            merged = made_by(swapped.inputs[0])
            if merged is not None and merged.op_type == "Reshape":
                return _from_heads(made_by(merged.inputs[0]))
    return None


def _to_tokens(heads: ir.Value) -> ir.Value | None:
    """The [batch, sequence, width] that is made of [batch, heads, sequence, head width]."""
    while reshape := only_user(heads, "Reshape"):  # the TorchScript exporter reshapes to the shape that it has
        heads = reshape.outputs[0]
    transpose = only_user(heads, "Transpose")
    if transpose is None or permutation(transpose) != [0, 2, 1, 3]:
        return None
    reshape = only_user(transpose.outputs[0], "Reshape")
    return reshape.outputs[0] if reshape is not None else None


def _without_nan_guard(probabilities: ir.Value) -> ir.Value:
    """Skip Where(IsNaN(p), 0, p), which clears rows that see no token; no row that is pooled is one."""
    guard = only_user(probabilities, "Where")
    condition = made_by(guard.inputs[0]) if guard is not None else None
    if guard is not None and condition is not None and condition.op_type == "IsNaN":
        return guard.outputs[0]
    return probabilities


def _split_mask(node: ir.Node | None) -> tuple[ir.Node | None, ir.Value | None]:
    """Scores and the mask that is added to them."""
    if node is None or node.op_type != "Add":
        return node, None
    first, second = node.inputs
    for scores, mask in ((first, second), (second, first)):
        maker = made_by(scores)
        if maker is not None and maker.op_type in ("MatMul", "Mul", "Div"):
            return maker, mask
    return None, None


def _split_scale(node: ir.Node | None) -> tuple[ir.Node | None, float]:
    """What a scalar multiplies or divides, and that scalar."""
    if node is None or node.op_type not in ("Mul", "Div"):
        return node, 1.0
    scalar = array(node.inputs[1])
    if scalar is None or scalar.size != 1:
        return node, 1.0
    factor = float(scalar.reshape(()))
    return made_by(node.inputs[0]), 1 / factor if node.op_type == "Div" else factor
