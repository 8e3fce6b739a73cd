"""A fused ONNX graph as a PyTorch module, so that PyTorch's compilers and kernels get the graph that others get.

Matmuls with their bias and activation become one step, and so do attention over a packed matmul and a sum with its
normalisation: `operators` says what runs them. What an exporter computes of shapes is done on Python's integers,
symbolic ones while torch.export traces, so that one program serves every batch.

A matmul between DequantizeLinears of FP8 (E4M3) takes the FP8 values themselves, and their scales. What writes its
input rounds it to FP8, where nothing else reads it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_deploy.core.errors import UnavailableError
from clip_deploy.onnx_graph.ir_tools import array

DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}
FP8 = torch.float8_e4m3fn
MAX_FP8 = torch.finfo(FP8).max


@dataclass
class Step:
    """One call, with the values of which names, "" where an input is left out."""

    call: Callable[..., Any]
    inputs: list[str]
    outputs: list[str]


class Operators:
    """What nearly all of a tower's time goes into, in PyTorch's own operators; `hidden` is [batch, tokens, width].

    What takes `inverse` gives FP8 values where that is set: its result times `inverse`, rounded.
    """

    def quantise(self, hidden: Tensor, inverse: float) -> Tensor:
        """FP8 values of hidden * inverse; beyond the largest FP8 number, that number."""
        return (hidden.float() * inverse).clamp(-MAX_FP8, MAX_FP8).to(FP8)

    def linear(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        activation: "Activation | None" = None,
        inverse: float | None = None,
    ) -> Tensor:
        """hidden @ weight.T + bias, then the activation; weight is [out, in].

        FP8 values are multiplied by scale [out], which is in float32, and give float16.
        """
        if scale is None:
            matmul = F.linear(hidden, weight, bias)
        else:
            matmul = F.linear(hidden.float(), weight.float()) * scale
            matmul = (matmul if bias is None else matmul + bias).half()
        found = matmul if activation is None else activation(matmul)
        return found if inverse is None else self.quantise(found, inverse)

    def attention(self, packed: Tensor, heads: int, scale: float, causal: bool, inverse: float | None = None) -> Tensor:
        """Attention over queries, keys and values, [batch, tokens, 3 * width]; gives [batch, tokens, width]."""
        parts = packed.chunk(3, -1)
        found = _multi_head_attention(*parts, num_heads=heads, scale=scale, unidirectional=int(causal))
        return found if inverse is None else self.quantise(found, inverse)

    def pooled_attention(
        self,
        query: Tensor,
        packed: Tensor,
        mask: Tensor | None = None,
        *,
        heads: int,
        scale: float,
        inverse: float | None = None,
    ) -> Tensor:
        """Attention of few queries [batch, count, width] to keys and values, [batch, tokens, 2 * width].

        `mask`: int32 [batch, tokens], 0 where a token is not seen.
        """
        keys, values = packed.chunk(2, -1)
        found = _multi_head_attention(query, keys, values, None, mask, num_heads=heads, scale=scale)
        return found if inverse is None else self.quantise(found, inverse)

    def skip_layer_norm(
        self,
        hidden: Tensor,
        skip: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        added: Tensor | None = None,
        *,
        epsilon: float,
        inverse: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sum of hidden, skip and `added` [width], layer-normalised, and the sum itself, which is never in FP8.

        `skip` may be that of one row of the batch, [1, tokens, width], for all.
        """
        total = hidden + skip if added is None else hidden + added + skip
        normalized = F.layer_norm(total, weight.shape, weight, bias, epsilon)
        return normalized if inverse is None else self.quantise(normalized, inverse), total

    def linear_skip_layer_norm(
        self,
        hidden: Tensor,
        matrix: Tensor,
        addend: Tensor | None,
        scale: Tensor | None,
        skip: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        added: Tensor | None = None,
        epsilon: float = 1e-5,
        inverse: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`skip_layer_norm` of `linear`, hidden @ matrix.T + addend."""
        matmul = self.linear(hidden, matrix, addend, scale)
        return self.skip_layer_norm(matmul, skip, weight, bias, added, epsilon=epsilon, inverse=inverse)

    def patchify(self, pixels: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The image's patches of `size`, row by row: [batch, channels, height, width] to [batch, patches, values]."""
        tall, wide = size
        grid = pixels.to(dtype).unflatten(3, (-1, wide)).unflatten(2, (-1, tall))
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class GraphModule(nn.Module):  # type: ignore[misc]
    """A fused tower: takes the graph's inputs in their order and gives its first output, as float32.

    Raises UnavailableError where the graph has an operator that is not known here.
    """

    def __init__(self, model: ir.Model, dtype: torch.dtype = torch.float32, operators: Operators | None = None) -> None:
        """`dtype`: what float32 becomes inside the graph, its weights and casts included."""
        super().__init__()
        self.dtype = dtype
        self.operators = operators or Operators()
        self.inputs = [value.name or "" for value in model.graph.inputs]
        self.output = model.graph.outputs[0].name or ""
        self.integers: dict[str, np.ndarray] = {}  # of shapes and axes
        self.weights: dict[str, str] = {}  # name in the graph -> name of the buffer
        self.steps: list[Step] = []
        self._biases, self._folded = _biases(model.graph)
        for node in model.graph:
            self._add(node)
        self._drop_unread()
        for name, value in model.graph.initializers.items():
            if any(name in step.inputs for step in self.steps):
                self._hold(name, value.const_value.numpy())

    def forward(self, *inputs: Tensor) -> Tensor:
        values: dict[str, Any] = dict(zip(self.inputs, map(self._cast_input, inputs), strict=True))
        values |= self.integers | {name: getattr(self, buffer) for name, buffer in self.weights.items()} | {"": None}
        with torch.device(inputs[0].device):  # of what the graph makes itself
            for step in self.steps:
                made = step.call(*(values[name] for name in step.inputs))
                values |= zip(step.outputs, made if isinstance(made, tuple | list) else (made,), strict=True)
        return values[self.output].float()

    def _cast_input(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.dtype is torch.float32 else tensor

    def _add(self, node: ir.Node) -> None:
        inputs = [value.name or "" if value is not None else "" for value in node.inputs]
        outputs = [value.name or "" for value in node.outputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        weight = _weight(node)
        if node in self._folded:
            return
        if weight is not None and weight.ndim == 2:
            self._add_linear(node, weight)
        elif node.op_type == "QuantizeLinear":
            self._add_quantise(node)
        elif node.op_type == "DequantizeLinear":
            pass  # the matmuls behind it take the FP8 values
        elif node.op_type == "Constant":
            self._hold(outputs[0], attributes["value"].numpy())
        elif node.op_type == "Transpose" and (patchified := _patchify(node)):
            source, size, patches, dtype = patchified
            dtype = self.dtype if dtype is torch.float32 else dtype
            call = partial(self.operators.patchify, size=size, dtype=dtype)
            self.steps.append(Step(call, [source.name or ""], [patches.outputs[0].name or ""]))
            self._folded.add(patches)
        elif node.op_type == "Split" and (attention := self._packed_by(node)):
            heads, causal = attention.attributes.get_int("num_heads"), attention.attributes.get_int("unidirectional", 0)
            scale = attention.attributes.get_float("scale", 0.0)
            call = partial(self.operators.attention, heads=heads, scale=scale, causal=bool(causal))
            self.steps.append(Step(call, inputs[:1], [attention.outputs[0].name or ""]))
            self._folded.add(attention)
        elif node.op_type == "MultiHeadAttention" and (packed := self._keys_of(node)):
            heads, scale = attributes["num_heads"], attributes.get("scale", 0.0)
            call = partial(self.operators.pooled_attention, heads=heads, scale=scale)
            self.steps.append(Step(call, [inputs[0], packed, *inputs[4:5]], outputs))
        elif node.op_type == "MultiHeadAttention":
            if node in self._biases:  # its matmuls add them
                inputs[3] = ""
            self.steps.append(Step(partial(_multi_head_attention, **attributes), inputs, outputs))
        elif node.op_type == "SkipLayerNormalization":
            total = outputs[3] if len(outputs) > 3 else ""
            made = [outputs[0], total or f"{outputs[0]}_total"]
            self._add_skip_layer_norm(node, node.inputs[:2], inputs[2:], made)
        elif node.op_type == "LayerNormalization" and (add := self._sum_of(node)):
            self._add_skip_layer_norm(node, add.inputs, inputs[1:], [outputs[0], inputs[0]])
        elif node.op_type == "Shape" and (cast := node.inputs[0].producer()) and cast.op_type == "Cast":
            self.steps.append(Step(partial(_shape, **attributes), [cast.inputs[0].name or ""], outputs))
        elif node.op_type == "Cast":
            dtype = DTYPES[ir.DataType(attributes["to"])]
            dtype = self.dtype if dtype is torch.float32 else dtype
            self.steps.append(Step(partial(_cast, dtype=dtype), inputs, outputs))
        elif node.op_type in OPERATORS:
            self.steps.append(Step(partial(OPERATORS[node.op_type], **attributes), inputs, outputs))
        else:
            raise UnavailableError(f"the graph has {node.op_type}, which has no PyTorch counterpart here")

    def _add_linear(self, node: ir.Node, weight: np.ndarray) -> None:
        """A matmul with its bias, and with the activation that alone reads it."""
        bias, output = self._biases.get(node, (None, node.outputs[0]))
        hidden, scale = _fp8_operands(node) or (node.inputs[0], None)
        held = {"w": weight.T, "b": bias, "s": scale}
        names = ["" if array is None else self._hold(f"{node.name}_{part}", array) for part, array in held.items()]
        call: Callable[..., Tensor] = self.operators.linear
        users = [use.node for use in output.uses()]
        if len(users) == 1 and users[0].op_type in ACTIVATIONS and len(users[0].inputs) == 1:
            settings = {name: attribute.value for name, attribute in users[0].attributes.items()}
            call = partial(call, activation=Activation(users[0].op_type, **settings))
            output = users[0].outputs[0]
            self._folded.add(users[0])
        self.steps.append(Step(call, [hidden.name or "", *names], [output.name or ""]))

    def _add_quantise(self, node: ir.Node) -> None:
        """Rounding to FP8: by what writes the values where nothing else reads them, else by itself."""
        source, output, inverse = node.inputs[0], node.outputs[0].name or "", 1 / _scalar(node.inputs[1])
        writer = next((step for step in self.steps if step.outputs[0] == source.name), None)
        if writer is not None and len(source.uses()) == 1 and _base(writer.call) in self._quantising():
            writer.call, writer.outputs[0] = partial(writer.call, inverse=inverse), output
        else:
            self.steps.append(Step(partial(self.operators.quantise, inverse=inverse), [source.name or ""], [output]))

    def _quantising(self) -> list[Callable[..., Any]]:
        """The operators that can write FP8."""
        own = self.operators
        return [
            own.linear,
            own.attention,
            own.pooled_attention,
            own.skip_layer_norm,
            own.linear_skip_layer_norm,
        ]

    def _add_skip_layer_norm(
        self, node: ir.Node, summands: Sequence[ir.Value], inputs: list[str], outputs: list[str]
    ) -> None:
        """A sum that is normalised, with the matmul that it alone reads."""
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        matmuls = {step.outputs[0]: step for step in self.steps if step.call == self.operators.linear}
        first, second = (value.name or "" for value in summands)
        given, call = [first, second, *inputs], partial(self.operators.skip_layer_norm, epsilon=epsilon)
        for value, other in zip(summands, (second, first), strict=True):
            if value.name in matmuls and len(value.uses()) == 1:
                matmul = matmuls[value.name]
                self.steps.remove(matmul)
                given = [*matmul.inputs, other, *inputs]
                call = partial(self.operators.linear_skip_layer_norm, epsilon=epsilon)
                break
        self.steps.append(Step(call, given, outputs))

    def _sum_of(self, normalization: ir.Node) -> ir.Node | None:
        """The addition that LayerNormalization is the first to read; its step is left out."""
        total, last = normalization.inputs[0], normalization.attributes.get_int("axis", -1) == -1
        add = total.producer()
        step = next((step for step in self.steps if step.outputs == [total.name]), None)
        if add is None or add.op_type != "Add" or add in self._folded or step is None or not last:
            return None
        if any(total.name in other.inputs for other in self.steps):
            return None
        self.steps.remove(step)
        return add

    def _drop_unread(self) -> None:
        """Leave out steps whose outputs no other reads: a shape needs no cast, a fused step not its parts."""
        read, kept = {self.output}, []
        for step in reversed(self.steps):
            if read & set(step.outputs):
                kept.append(step)
                read |= set(step.inputs) - {""}
        self.steps = kept[::-1]

    def _keys_of(self, attention: ir.Node) -> str | None:
        """Keys and values in one, where an attention with another query takes both parts of a packed matmul."""
        query, keys, values = (value.producer() for value in attention.inputs[:3])
        plain = len(attention.inputs) < 6 and not attention.attributes.get_int("unidirectional", 0)
        if attention not in self._biases or keys is None or keys is not values or query is keys or not plain:
            return None
        whole = keys.op_type == "Split" and list(keys.outputs) == list(attention.inputs[1:3])
        return keys.inputs[0].name if whole else None

    def _packed_by(self, split: ir.Node) -> ir.Node | None:
        """The attention that takes all three parts of a packed matmul, with no mask but the order of tokens."""
        users = {use.node for value in split.outputs for use in value.uses()}
        attention = users.pop() if len(users) == 1 else None
        if attention is None or attention not in self._biases or list(attention.inputs[:3]) != list(split.outputs):
            return None
        padding, added = ([*attention.inputs, *[None] * 3])[4:6]
        causal = attention.attributes.get_int("unidirectional", 0)
        return attention if added is None and (padding is None or causal) else None

    def _hold(self, name: str, content: np.ndarray) -> str:
        """Keep a constant: short integers for shapes, all else as a buffer."""
        if content.dtype == np.int64 and content.ndim < 2:
            self.integers[name] = content
        else:
            self.weights[name] = f"constant_{len(self.weights)}"
            self.register_buffer(self.weights[name], self._cast_input(_tensor(content)))
        return name


def _base(call: Callable[..., Any]) -> Callable[..., Any]:
    return call.func if isinstance(call, partial) else call


def _tensor(content: np.ndarray) -> Tensor:
    if content.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(np.array(content.view(np.uint8), order="C")).view(FP8)
    if content.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(content.astype(np.float32, order="C")).bfloat16()
    return torch.from_numpy(np.array(content, order="C"))


Biases = dict[ir.Node, tuple[np.ndarray | None, ir.Value]]


def _biases(graph: ir.Graph) -> tuple[Biases, set[ir.Node]]:
    """Matmuls' biases with the value that each matmul then gives, and the additions that this makes needless.

    An attention whose biases its matmuls take is among the keys.
    """
    found: Biases = {}
    needless: set[ir.Node] = set()
    for node in graph:
        if node.op_type == "Add" and (pair := _matmul_and_bias(node)):
            found[pair[0]] = (pair[1], node.outputs[0])
            needless.add(node)
        elif node.op_type == "MultiHeadAttention" and (parts := _attention_biases(node)):
            found |= parts | {node: (None, node.outputs[0])}
    return found, needless


def _matmul_and_bias(add: ir.Node) -> tuple[ir.Node, np.ndarray] | None:
    for given, other in (add.inputs, reversed(add.inputs)):
        bias, matmul = array(other), given.producer() if given is not None else None
        if bias is not None and bias.ndim == 1 and matmul is not None and _is_linear(matmul):
            return matmul, bias
    return None


def _attention_biases(attention: ir.Node) -> Biases | None:
    bias = array(attention.inputs[3]) if len(attention.inputs) > 3 else None
    makers = [value.producer() if value is not None else None for value in attention.inputs[:3]]
    if bias is None or None in makers:
        return None
    parts = dict(zip(attention.inputs[:3], np.split(bias, 3), strict=True))
    found: Biases = {}
    for maker in dict.fromkeys(makers):
        assert maker is not None
        matmul = maker.inputs[0].producer() if maker.op_type == "Split" and maker.inputs[0] is not None else maker
        if matmul is None or not _is_linear(matmul) or not all(value in parts for value in maker.outputs):
            return None
        found[matmul] = (np.concatenate([parts[value] for value in maker.outputs]), matmul.outputs[0])
    return found


def _patchify(transpose: ir.Node) -> tuple[ir.Value, tuple[int, int], ir.Node, torch.dtype] | None:
    """What patch_embedding.conv_to_matmul wrote: the image before any cast, a patch's size, the last node, its type."""
    grid, patches = transpose.inputs[0].producer(), [use.node for use in transpose.outputs[0].uses()]
    shape = array(grid.inputs[1]) if grid is not None and grid.op_type == "Reshape" else None
    whole = shape is not None and len(patches) == 1 and patches[0].op_type == "Reshape"
    if grid is None or shape is None or not whole or list(transpose.attributes["perm"].as_ints()) != [0, 2, 4, 1, 3, 5]:
        return None
    image, dtype = grid.inputs[0], DTYPES[grid.inputs[0].dtype or ir.DataType.FLOAT]
    cast = image.producer()
    if cast is not None and cast.op_type == "Cast":
        image, dtype = cast.inputs[0], DTYPES[ir.DataType(cast.attributes.get_int("to", 1))]
    return image, (int(shape[3]), int(shape[5])), patches[0], dtype


def _is_linear(node: ir.Node) -> bool:
    weight = _weight(node)
    return weight is not None and weight.ndim == 2 and len(node.outputs[0].uses()) == 1


def _weight(node: ir.Node) -> np.ndarray | None:
    """A matmul's weight [in, out], in FP8 where it is dequantised."""
    if node.op_type != "MatMul":
        return None
    maker = node.inputs[1].producer()
    return array(node.inputs[1] if maker is None or maker.op_type != "DequantizeLinear" else maker.inputs[0])


def _fp8_operands(node: ir.Node) -> tuple[ir.Value, np.ndarray] | None:
    """Of a matmul between two DequantizeLinears: its FP8 input, and the scale of each output, float32 [out]."""
    makers = [value.producer() for value in node.inputs]
    if any(maker is None or maker.op_type != "DequantizeLinear" for maker in makers):
        return None
    hidden, weight = makers
    return hidden.inputs[0], _scalar(hidden.inputs[1]) * _constant(weight.inputs[1]).astype(np.float32)


def _scalar(value: ir.Value) -> float:
    return float(_constant(value))


def _constant(value: ir.Value) -> np.ndarray:
    found = array(value)
    if found is None:
        raise UnavailableError(f"the graph computes {value.name}, a scale, which is not known here")
    return found


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    added: Tensor | None = None,
    *,
    num_heads: int,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> Tensor:
    """MultiHeadAttention of com.microsoft, [batch, tokens, width] each.

    Texts are padded behind their end: where tokens see only those before them, padding needs no mask.
    """
    hidden = (query, key, value) if bias is None else map(torch.add, (query, key, value), bias.chunk(3))
    heads = [tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tokens in hidden]
    mask = added
    if padding is not None and not unidirectional:
        seen = padding.bool()[:, None, None]
        mask = seen if added is None else added.masked_fill(~seen, -torch.inf)
    attended = F.scaled_dot_product_attention(
        heads[0], heads[1], heads[2], mask, is_causal=bool(unidirectional), scale=scale or None
    )
    return attended.transpose(1, 2).flatten(2)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Of integers to integers none is needed: they are token ids, masks and places."""
    integers = (torch.int32, torch.int64)
    same = isinstance(value, np.ndarray) or (value.dtype in integers and dtype in integers)
    return value if same else value.to(dtype)


def _shape(tensor: Tensor, start: int = 0, end: int | None = None) -> np.ndarray:
    return np.array([*tensor.shape[start:end]], dtype=object)


def _gather(source: Any, index: Any, axis: int = 0) -> Any:
    if isinstance(source, np.ndarray):
        return np.asarray(np.take(source, index.astype(np.int64), axis), dtype=source.dtype)  # never a bare number
    if isinstance(index, np.ndarray):
        if index.ndim == 0:
            return source.select(axis, int(index))
        if len(index) == 1:
            place = int(index[0])
            start = place if place >= 0 else source.shape[axis] + place
            return source.narrow(axis, start, 1).contiguous()  # no copy where the batch is 1
        return torch.stack([source.select(axis, int(row)) for row in index], axis)
    return F.embedding(index, source) if axis == 0 else torch.index_select(source, axis, index)


def _gather_rows(source: Tensor, index: Tensor, batch_dims: int = 0) -> Tensor:
    """GatherND: one token of each row, [batch, tokens, width] and [batch, 2]."""
    return source[index[:, 0], index[:, 1]]


def _slice(source: Any, start: np.ndarray, end: np.ndarray, axes: np.ndarray, steps: np.ndarray | None = None) -> Any:
    cuts: list[slice] = [slice(None)] * source.ndim
    for index, axis in enumerate(axes.tolist()):
        limit = end.tolist()[index]
        stop = None if isinstance(limit, int) and limit >= np.iinfo(np.int32).max else limit
        cuts[axis] = slice(start.tolist()[index], stop, steps.tolist()[index] if steps is not None else 1)
    return source[tuple(cuts)]


def _unsqueeze(source: Any, axes: np.ndarray) -> Any:
    for axis in axes.tolist():
        source = np.expand_dims(source, axis) if isinstance(source, np.ndarray) else source.unsqueeze(axis)
    return source


def _squeeze(source: Any, axes: np.ndarray | None = None) -> Any:
    if isinstance(source, np.ndarray):
        return source.squeeze() if axes is None else source.squeeze(tuple(axes.tolist()))
    return source.squeeze() if axes is None else source.squeeze(axes.tolist())


def _concat(*parts: Any, axis: int) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis)
    return torch.cat(parts, axis)


def _split(source: Tensor, sizes: np.ndarray, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = source.split(sizes.tolist(), axis)
    return found


def _reshape(source: Any, shape: np.ndarray, allowzero: int = 0) -> Any:
    sizes = [
        source.shape[axis] if isinstance(size, int) and size == 0 else size for axis, size in enumerate(shape.tolist())
    ]
    return source.reshape(sizes)


def _expand(source: Any, shape: np.ndarray) -> Any:
    if isinstance(source, np.ndarray):
        return np.broadcast_to(source, shape.tolist())
    missing = len(shape) - source.ndim
    sizes = [
        -1 if axis >= missing and isinstance(size, int) and size == 1 else size
        for axis, size in enumerate(shape.tolist())
    ]
    return source.expand(sizes)


def _filled(shape: np.ndarray, value: Any = None) -> Any:
    content = value.numpy().reshape(()) if value is not None else np.float32(0)
    if np.issubdtype(content.dtype, np.integer):
        return np.full(shape.tolist(), content)
    return torch.full(shape.tolist(), float(content))


def _range(start: np.ndarray, limit: np.ndarray, step: np.ndarray) -> Tensor:
    return torch.arange(start.tolist(), limit.tolist(), step.tolist())


def _where(condition: Any, first: Any, second: Any) -> Any:
    if isinstance(condition, np.ndarray):
        return np.where(condition.astype(bool), first, second)
    return torch.where(condition, *(item.item() if isinstance(item, np.ndarray) else item for item in (first, second)))


def _pair(function: Callable[[Any, Any], Any], first: Any, second: Any) -> Any:
    """Call on two tensors, two arrays, or a tensor and an array of one number."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        first, second = (item.item() if isinstance(item, np.ndarray) else item for item in (first, second))
    return function(first, second)


def _divide(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor) and first.is_floating_point():
        return first / second
    return first // second


def _gemm(
    first: Tensor,
    second: Tensor,
    added: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - ONNX's names
    transB: int = 0,  # noqa: N803
) -> Tensor:
    matmul = alpha * ((first.T if transA else first) @ (second.T if transB else second))
    return matmul if added is None else matmul + beta * added


def _activate(tensor: Tensor, bias: Tensor | None = None, *, kind: str, **settings: Any) -> Tensor:
    return Activation(kind, **settings)(tensor if bias is None else tensor + bias)


def _layer_norm(
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    axis: int = -1,
    stash_type: int = 1,
) -> Tensor:
    return F.layer_norm(tensor, weight.shape, weight, bias, epsilon)


def _clip(tensor: Tensor, low: np.ndarray | None = None, high: np.ndarray | None = None) -> Tensor:
    return tensor.clamp(*(None if limit is None else limit.item() for limit in (low, high)))


def _argmax(tensor: Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return tensor.argmax(axis, keepdim=bool(keepdims))  # the first of equal ones


def _cumulative_sum(tensor: Tensor, axis: np.ndarray, exclusive: int = 0, reverse: int = 0) -> Tensor:
    if exclusive or reverse:
        raise UnavailableError("the graph has a CumSum from the end, or without its last, which is not known here")
    return tensor.cumsum(int(axis))


def _sum(tensor: Tensor, axes: np.ndarray, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return tensor.sum(axes.tolist(), keepdim=bool(keepdims))


def _transpose(tensor: Tensor, perm: list[int]) -> Tensor:
    return tensor.permute(*perm)


@dataclass(frozen=True)
class Activation:
    """Gelu, FastGelu (its approximation by tanh) or QuickGelu, as ONNX and com.microsoft define them."""

    kind: str
    approximate: str = "none"  # of Gelu, "tanh" or "none"
    alpha: float = 1.702  # of QuickGelu

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.kind == "QuickGelu":
            return tensor * torch.sigmoid(self.alpha * tensor)
        return F.gelu(tensor, approximate=self.form)

    @property
    def form(self) -> str:
        """Of Gelu, "tanh" or "none"."""
        return "tanh" if self.kind == "FastGelu" else self.approximate


ACTIVATIONS = ("Gelu", "FastGelu", "QuickGelu")

OPERATORS: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": partial(_pair, lambda first, second: first + second),
    "And": partial(_pair, lambda first, second: first & second),
    "ArgMax": _argmax,
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "CumSum": _cumulative_sum,
    "Div": partial(_pair, _divide),
    "Equal": partial(_pair, lambda first, second: first == second),
    "Expand": _expand,
    "Floor": torch.floor,
    "Gather": _gather,
    "GatherElements": lambda source, index, axis: source.gather(axis, index),
    "GatherND": _gather_rows,
    "Gemm": _gemm,
    "Identity": lambda value: value,
    "LayerNormalization": _layer_norm,
    "LessOrEqual": partial(_pair, lambda first, second: first <= second),
    "MatMul": lambda first, second: first @ second,
    "Mod": partial(_pair, lambda first, second: first % second),
    "Mul": partial(_pair, lambda first, second: first * second),
    "Neg": torch.neg,
    "Not": lambda value: ~value,
    "Range": _range,
    "ReduceSum": _sum,
    "Relu": F.relu,
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": partial(_pair, lambda first, second: first - second),
    "Tanh": torch.tanh,
    "Tile": lambda tensor, repeats: tensor.repeat(repeats.tolist()),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    **{kind: partial(_activate, kind=kind) for kind in ACTIVATIONS},
}
