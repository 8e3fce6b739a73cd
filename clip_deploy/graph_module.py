"""A fused ONNX graph as a PyTorch module, so that PyTorch's compilers get the graph that the other runtimes get.

Products with their bias become linear layers, attention becomes scaled_dot_product_attention. What an exporter computes
of shapes is done on Python's integers, symbolic ones while torch.export traces, so that one program serves every batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_deploy.attention import array
from clip_deploy.core.errors import UnavailableError

DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}


@dataclass
class Step:
    """One call, with the values of which names, "" where an input is left out."""

    call: Callable[..., Any]
    inputs: list[str]
    outputs: list[str]


class GraphModule(nn.Module):
    """A fused tower: takes the graph's inputs in their order and gives its first output, as float32.

    Raises UnavailableError where the graph has an operator that is not known here.
    """

    def __init__(self, model: ir.Model, floating: torch.dtype = torch.float32) -> None:
        """`floating`: what float32 becomes inside the graph, its weights and casts included."""
        super().__init__()
        self.floating = floating
        self.inputs = [value.name or "" for value in model.graph.inputs]
        self.output = model.graph.outputs[0].name or ""
        self.integers: dict[str, np.ndarray] = {}  # of shapes and axes
        self.weights: dict[str, str] = {}  # name in the graph -> name of the buffer
        self.steps: list[Step] = []
        self._biases, self._folded = _biases(model.graph)
        for node in model.graph:
            self._add(node)
        for name, value in model.graph.initializers.items():
            if any(name in step.inputs for step in self.steps):
                self._hold(name, value.const_value.numpy())

    def forward(self, *inputs: Tensor) -> Tensor:
        values: dict[str, Any] = dict(zip(self.inputs, map(self._rounded, inputs), strict=True))
        values |= self.integers | {name: getattr(self, buffer) for name, buffer in self.weights.items()} | {"": None}
        with torch.device(inputs[0].device):  # of what the graph makes itself
            for step in self.steps:
                made = step.call(*(values[name] for name in step.inputs))
                values |= zip(step.outputs, made if isinstance(made, tuple | list) else (made,), strict=True)
        return values[self.output].float()

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.floating) if tensor.dtype is torch.float32 else tensor

    def _add(self, node: ir.Node) -> None:
        inputs = [value.name or "" if value is not None else "" for value in node.inputs]
        outputs = [value.name or "" for value in node.outputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        weight = array(node.inputs[1]) if node.op_type == "MatMul" else None
        if node in self._folded:
            return
        if weight is not None and weight.ndim == 2:
            bias, output = self._biases.get(node, (None, node.outputs[0]))
            names = [
                self._hold(f"{node.name}_{part}", held)
                for part, held in (("w", weight.T), ("b", bias))
                if held is not None
            ]
            self.steps.append(Step(F.linear, [inputs[0], *names], [output.name or ""]))
        elif node.op_type == "Constant":
            self._hold(outputs[0], attributes["value"].numpy())
        elif node.op_type == "MultiHeadAttention":
            if node in self._biases:  # its products add them
                inputs[3] = ""
            self.steps.append(Step(partial(_attention, **attributes), inputs, outputs))
        elif node.op_type == "Cast":
            dtype = DTYPES[ir.DataType(attributes["to"])]
            dtype = self.floating if dtype is torch.float32 else dtype
            self.steps.append(Step(partial(_cast, dtype=dtype), inputs, outputs))
        elif node.op_type in OPERATORS:
            self.steps.append(Step(partial(OPERATORS[node.op_type], **attributes), inputs, outputs))
        else:
            raise UnavailableError(f"the graph has {node.op_type}, which has no PyTorch counterpart here")

    def _hold(self, name: str, content: np.ndarray) -> str:
        """Keep a constant: short integers for shapes, all else as a buffer."""
        if content.dtype == np.int64 and content.ndim < 2:
            self.integers[name] = content
        else:
            self.weights[name] = f"constant_{len(self.weights)}"
            self.register_buffer(self.weights[name], self._rounded(_tensor(content)))
        return name


def _tensor(content: np.ndarray) -> Tensor:
    if content.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(content.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(content, order="C"))


Biases = dict[ir.Node, tuple[np.ndarray | None, ir.Value]]


def _biases(graph: ir.Graph) -> tuple[Biases, set[ir.Node]]:
    """Products' biases with the value that each product then gives, and the additions that this makes needless.

    An attention whose biases its products take is among the keys.
    """
    found: Biases = {}
    needless: set[ir.Node] = set()
    for node in graph:
        if node.op_type == "Add" and (pair := _product_and_bias(node)):
            found[pair[0]] = (pair[1], node.outputs[0])
            needless.add(node)
        elif node.op_type == "MultiHeadAttention" and (parts := _attention_biases(node)):
            found |= parts | {node: (None, node.outputs[0])}
    return found, needless


def _product_and_bias(add: ir.Node) -> tuple[ir.Node, np.ndarray] | None:
    for given, other in (add.inputs, reversed(add.inputs)):
        bias, product = array(other), given.producer() if given is not None else None
        if bias is not None and bias.ndim == 1 and product is not None and _is_linear(product):
            return product, bias
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
        product = maker.inputs[0].producer() if maker.op_type == "Split" and maker.inputs[0] is not None else maker
        if product is None or not _is_linear(product) or not all(value in parts for value in maker.outputs):
            return None
        found[product] = (np.concatenate([parts[value] for value in maker.outputs]), product.outputs[0])
    return found


def _is_linear(node: ir.Node) -> bool:
    weight = array(node.inputs[1]) if node.op_type == "MatMul" else None
    return weight is not None and weight.ndim == 2 and len(node.outputs[0].uses()) == 1


def _attention(
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
    rows = (query, key, value) if bias is None else map(torch.add, (query, key, value), bias.chunk(3))
    heads = [tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tokens in rows]
    mask = added
    if padding is not None and not unidirectional:
        seen = padding.bool()[:, None, None]
        mask = seen if added is None else added.masked_fill(~seen, -torch.inf)
    attended = F.scaled_dot_product_attention(
        heads[0], heads[1], heads[2], mask, is_causal=bool(unidirectional), scale=scale or None
    )
    return attended.transpose(1, 2).flatten(2)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value if isinstance(value, np.ndarray) else value.to(dtype)


def _shape(tensor: Tensor, start: int = 0, end: int | None = None) -> np.ndarray:
    return np.array([*tensor.shape[start:end]], dtype=object)


def _gather(source: Any, index: Any, axis: int = 0) -> Any:
    if isinstance(source, np.ndarray):
        return np.asarray(np.take(source, index.astype(np.int64), axis), dtype=source.dtype)  # never a bare number
    if isinstance(index, np.ndarray):
        if index.ndim == 0:
            return source.select(axis, int(index))
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
    return source.split(sizes.tolist(), axis)


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
    return torch.where(condition, first, second)


def _pair(function: Callable[[Any, Any], Any], first: Any, second: Any) -> Any:
    """Call on two tensors, two arrays, or a tensor and an array of one number."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        first, second = (item.item() if isinstance(item, np.ndarray) else item for item in (first, second))
    return function(first, second)


def _divide(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor) and first.is_floating_point():
        return first / second
    return first // second


def _quick_gelu(tensor: Tensor, alpha: float = 1.702) -> Tensor:
    return tensor * torch.sigmoid(alpha * tensor)


def _gelu(tensor: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(tensor, approximate=approximate)


def _fast_gelu(tensor: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(tensor if bias is None else tensor + bias, approximate="tanh")


def _normalise(
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    axis: int = -1,
    stash_type: int = 1,
) -> Tensor:
    return F.layer_norm(tensor, weight.shape, weight, bias, epsilon)


def _argmax(tensor: Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return tensor.argmax(axis, keepdim=bool(keepdims))  # the first of equal ones


def _transpose(tensor: Tensor, perm: list[int]) -> Tensor:
    return tensor.permute(*perm)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": partial(_pair, lambda first, second: first + second),
    "And": partial(_pair, lambda first, second: first & second),
    "ArgMax": _argmax,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Div": partial(_pair, _divide),
    "Equal": partial(_pair, lambda first, second: first == second),
    "Expand": _expand,
    "FastGelu": _fast_gelu,
    "Gather": _gather,
    "GatherND": _gather_rows,
    "Gelu": _gelu,
    "Identity": lambda value: value,
    "LayerNormalization": _normalise,
    "LessOrEqual": partial(_pair, lambda first, second: first <= second),
    "MatMul": lambda first, second: first @ second,
    "Mod": partial(_pair, lambda first, second: first % second),
    "Mul": partial(_pair, lambda first, second: first * second),
    "QuickGelu": _quick_gelu,
    "Range": _range,
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
}
