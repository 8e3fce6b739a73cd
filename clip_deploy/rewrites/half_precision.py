"""Half precision: BF16, and FP16 that cannot overflow: ranges found on the calibration set say what stays in FP32.

Where an integer is computed from floats, as the place of a text's end is, its floats stay in FP32: half precision holds
whole numbers to 2048 (FP16) and 256 (BF16) only.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from clip_deploy.core.config import Device
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.providers import CPU, CUDA, load_cuda
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.ir_tools import initializer

HEADROOM = 2.0  # what a deployment's inputs may exceed those of the calibration set by
MAX_FLOAT16 = float(np.finfo(np.float16).max) / HEADROOM
MASKED_SCORE = -1e4  # a masked score: its softmax is 0 in any precision
MASKS_BELOW = -1e30  # no trained constant is that low

FLOAT32_INPUT_OPS = {"Range", "Resize"}  # their inputs are float32, or ONNX Runtime's kernels are
DTYPE_FREE_OPS = {"Shape", "Size", "IsNaN", "IsInf"}  # of a float what any precision tells

SCAN_ROWS = 8  # calibration inputs to run at a time

Batches = Callable[[], Iterable[dict[str, np.ndarray]]]


def clamp_masks(model: ir.Model) -> bool:
    """Raise the lowest constants of masks, float32's lowest or -inf, to one that float16 holds."""
    found = False
    for node in model.graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and _is_mask(attribute.as_tensor()):
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _clamped(attribute.as_tensor()))
                found = True
    for value in model.graph.initializers.values():
        if value.const_value is not None and _is_mask(value.const_value):
            value.const_value = _clamped(value.const_value)
            found = True
    return found


def _is_mask(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype == ir.DataType.FLOAT and tensor.size > 0 and float(tensor.numpy().min()) < MASKS_BELOW


def _clamped(tensor: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(np.maximum(tensor.numpy(), np.float32(MASKED_SCORE)), name=tensor.name)


def in_words(tower: str, kept: Mapping[str, float]) -> list[str]:
    """What to_float16 returns, as a target's `left_in_fp32` says it: "<tower>: <node> (<largest value>)"."""
    return [f"{tower}: {node} ({value:.3g})" for node, value in kept.items()]


def to_float16(
    path: Path, batches: Batches, keep_fp32: Sequence[str] = (), device: Device = Device.cpu
) -> dict[str, float]:
    """Convert a graph's weights and computation to float16 in place; its inputs and outputs stay float32.

    A node stays in float32 where one of its tensors comes within HEADROOM of float16's largest value. For that the
    graph runs on `device`, or on the CPU where there is none.

    Args:
        path: a float32 graph, <tower>.onnx.
        batches: calls for the calibration inputs, batch by batch.
        keep_fp32: nodes that stay in float32 too, as "<tower>: <node>"; ConfigError where the tower has no such node.

    Returns:
        The largest absolute value at each node that would overflow and stays in float32, by the node's name.

    Raises:
        UnavailableError: the outputs hold NaN or Inf, before or after the conversion.
    """
    model = _load(path)
    kept = onnx_file.kept_nodes(model, path.stem, keep_fp32)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        largest = ranges(model, path.stem, batches, Path(folder), device)
    overflowing = _overflowing(model.graph, largest | {item.name: _magnitude(item) for item in model.graph.initializer})
    _cast_down(model, path, set(largest), {*overflowing, *kept}, ir.DataType.FLOAT16)
    session = _open(path, device)
    for feeds in batches():
        _refuse_non_finite(session.run(None, feeds), path.stem, "FP16")
    return overflowing


def to_bfloat16(path: Path, keep_fp32: Sequence[str] = ()) -> None:
    """Convert a graph's weights and computation to bfloat16 in place, which has float32's range; only GPUs run it.

    `keep_fp32` is that of to_float16.
    """
    model = _load(path)
    kept = onnx_file.kept_nodes(model, path.stem, keep_fp32)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        floats = set(onnx_file.float_tensors(model, Path(folder)))
    folded = {node.name for node in model.graph.node if node.op_type == "Expand"}  # by the CPU, which has it in FP32
    _cast_down(model, path, floats, {*folded, *kept}, ir.DataType.BFLOAT16)


def _load(path: Path) -> onnx.ModelProto:
    model = onnx.load(path)
    onnx_file.name_nodes(model)
    del model.graph.value_info[:]  # the fusions leave stale types
    return model


def _cast_down(model: onnx.ModelProto, path: Path, floats: set[str], in_fp32: set[str], dtype: ir.DataType) -> None:
    """Write the graph to `path` with its float32 tensors in another type, but those of `in_fp32` and _stays_float32."""
    lowered = ir.from_proto(model)
    graph = lowered.graph
    floats = floats | {name for name, value in graph.initializers.items() if value.dtype == ir.DataType.FLOAT}
    whole = in_fp32 | _stays_float32(graph, floats)
    cast_to: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def cast(value: ir.Value, to: ir.DataType, node: ir.Node) -> ir.Value:
        """The value in another type, for `node` and those behind it."""
        if (value, to) not in cast_to:
            if value.is_initializer():
                cast_to[value, to] = _converted(graph, value, to)
            else:
                made = ir.node("Cast", [value], {"to": int(to)})
                made.outputs[0].name = f"{value.name}_{to.name.lower()}"
                graph.insert_before(node, made)
                cast_to[value, to] = made.outputs[0]
        return cast_to[value, to]

    lower_made: set[ir.Value] = set()
    for node in list(graph):
        wanted = ir.DataType.FLOAT if node.name in whole else dtype
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in floats and (value in lower_made) != (wanted == dtype):
                node.replace_input_with(index, cast(value, wanted, node))
        if wanted == dtype:
            _lower_attributes(node, dtype)
            lower_made |= {value for value in node.outputs if value.name in floats}
    for index, value in enumerate(graph.outputs):
        if value in lower_made:
            _restore(graph, index)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink()
    onnx_file.save(lowered, path)


def _stays_float32(graph: ir.Graph, floats: set[str]) -> set[str]:
    """Nodes with floats that an integer or a truth value is computed from, and those whose type is fixed."""
    exact = {node for node in graph if node.op_type in FLOAT32_INPUT_OPS}
    stack = [node for node in graph if node.op_type not in DTYPE_FREE_OPS and not _gives(node, floats)]
    while stack:
        node = stack.pop()
        if node not in exact and any(value is not None and value.name in floats for value in node.inputs):
            exact.add(node)
            stack += [maker for value in node.inputs if value is not None and (maker := value.producer())]
    return {node.name or "" for node in exact}


def _gives(node: ir.Node, floats: set[str]) -> bool:
    return any(value.name in floats for value in node.outputs)


def _converted(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Another initializer with the same content, rounded."""
    assert value.const_value is not None
    return initializer(graph, f"{value.name}_{dtype.name.lower()}", value.const_value.numpy().astype(dtype.numpy()))


def _lower_attributes(node: ir.Node, dtype: ir.DataType) -> None:
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(dtype))
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT:
            content = ir.tensor(attribute.as_tensor().numpy().astype(dtype.numpy()))
            node.attributes[name] = ir.AttrTensor(name, content)


def _restore(graph: ir.Graph, index: int) -> None:
    """Give an output in float32 again, under its name."""
    value = graph.outputs[index]
    back = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
    back.outputs[0].name, value.name = value.name, f"{value.name}_lower"
    back.outputs[0].shape, back.outputs[0].type, value.type = value.shape, value.type, None
    graph.append(back)
    graph.outputs[index] = back.outputs[0]


def ranges(
    model: onnx.ModelProto, tower: str, batches: Batches, work: Path, device: Device = Device.cpu
) -> dict[str, float]:
    """Largest absolute value of each float32 tensor that the graph takes or computes, over all batches."""
    names = onnx_file.float_tensors(model, work)
    scan = onnx_file.copy_of(model)
    own = len(scan.graph.output)
    for name in names:
        scan.graph.node.append(helper.make_node("Abs", [name], [f"{name}/abs"]))
        scan.graph.node.append(helper.make_node("ReduceMax", [f"{name}/abs"], [f"{name}/largest"], keepdims=0))
        scan.graph.output.append(helper.make_tensor_value_info(f"{name}/largest", TensorProto.FLOAT, []))
    onnx_file.save(ir.from_proto(scan), work / "scan.onnx")
    session = _open(work / "scan.onnx", device)
    found = np.zeros(len(names))
    for feeds in batches():
        outputs = session.run(None, feeds)
        _refuse_non_finite(outputs[:own], tower, "FP32")
        found = np.maximum(found, np.array(outputs[own:]))
    return dict(zip(names, found.tolist(), strict=True))


def _open(path: Path, device: Device) -> onnxruntime.InferenceSession:
    """On the GPU where one is asked for and there: on a CPU, the images of an L/14 take minutes."""
    if device is Device.cuda:
        try:
            load_cuda()
        except UnavailableError:
            return onnx_file.open_session(path)
        return onnx_file.open_session(path, severity=3, providers=(CUDA, CPU))  # 2: that it copies between both
    return onnx_file.open_session(path)


def _overflowing(graph: onnx.GraphProto, largest: dict[str, float]) -> dict[str, float]:
    """Nodes that read or write a value beyond LARGEST, with that value."""
    found = {}
    for node in graph.node:
        value = max((largest.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0)
        if not value <= MAX_FLOAT16:
            found[node.name] = value
    return found


def _magnitude(tensor: TensorProto) -> float:
    values = numpy_helper.to_array(tensor)
    return float(np.abs(values).max()) if values.dtype == np.float32 and values.size else 0.0


def _refuse_non_finite(outputs: Sequence[np.ndarray], tower: str, precision: str) -> None:
    if not all(np.isfinite(output).all() for output in outputs):
        raise UnavailableError(f"{tower} gives NaN or Inf in {precision} on the calibration set")
