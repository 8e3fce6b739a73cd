"""FP16 graphs that cannot overflow: ranges found on the calibration set say which nodes stay in FP32."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from clip_deploy import onnx_graph
from clip_deploy.core.errors import UnavailableError

HEADROOM = 2.0  # what a deployment's inputs may exceed those of the calibration set by
LARGEST = float(np.finfo(np.float16).max) / HEADROOM
HIDDEN = -1e4  # a masked score: its softmax is 0 in any precision
MASKS_BELOW = -1e30  # no trained constant is that low

SCAN_ROWS = 8  # calibration inputs to run at a time

Batches = Callable[[], Iterable[dict[str, np.ndarray]]]


def clamp_masks(model: ir.Model) -> bool:
    """Raise the lowest constants of masks, float32's lowest or -inf, to one that float16 holds."""
    found = False
    for node in model.graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and _hides(attribute.as_tensor()):
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _clamped(attribute.as_tensor()))
                found = True
    for value in model.graph.initializers.values():
        if value.const_value is not None and _hides(value.const_value):
            value.const_value = _clamped(value.const_value)
            found = True
    return found


def _hides(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype == ir.DataType.FLOAT and tensor.size > 0 and float(tensor.numpy().min()) < MASKS_BELOW


def _clamped(tensor: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(np.maximum(tensor.numpy(), np.float32(HIDDEN)), name=tensor.name)


def halve(path: Path, batches: Batches) -> dict[str, float]:
    """Convert a graph's weights and computation to float16 in place; its inputs and outputs stay float32.

    A node stays in float32 where one of its tensors comes within HEADROOM of float16's largest value.

    Args:
        path: a float32 graph.
        batches: calls for the calibration inputs, batch by batch.

    Returns:
        The largest absolute value at each node that stays in float32, by the node's name.

    Raises:
        UnavailableError: the outputs hold NaN or Inf, before or after the conversion.
    """
    _refuse_non_finite(path, batches, "FP32")
    model = onnx.load(path)
    onnx_graph.name_nodes(model)
    del model.graph.value_info[:]  # the fusions leave stale types
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        largest = ranges(model, batches, Path(folder))
    onnx_graph.declare_floats(model, largest)
    largest |= {tensor.name: _magnitude(tensor) for tensor in model.graph.initializer}
    overflowing = _overflowing(model.graph, largest)
    halved = convert_float_to_float16(
        model, keep_io_types=True, disable_shape_infer=True, node_block_list=list(overflowing)
    )
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink()
    result = ir.from_proto(halved)
    _join(result.graph, set(overflowing))
    result.graph.sort()  # the converter appends its casts of the inputs at the end
    onnx_graph.save(result, path)
    _refuse_non_finite(path, batches, "FP16")
    return overflowing


def ranges(model: onnx.ModelProto, batches: Batches, work: Path) -> dict[str, float]:
    """Largest absolute value of each float32 tensor that the graph takes or computes, over all batches."""
    names = onnx_graph.float_tensors(model, work)
    scan = onnx_graph.copy_of(model)
    del scan.graph.output[:]
    for name in names:
        scan.graph.node.append(helper.make_node("Abs", [name], [f"{name}/abs"]))
        scan.graph.node.append(helper.make_node("ReduceMax", [f"{name}/abs"], [f"{name}/largest"], keepdims=0))
        scan.graph.output.append(helper.make_tensor_value_info(f"{name}/largest", TensorProto.FLOAT, []))
    onnx_graph.save(ir.from_proto(scan), work / "scan.onnx")
    session = onnxruntime.InferenceSession(work / "scan.onnx", providers=["CPUExecutionProvider"])
    found = np.zeros(len(names))
    for feeds in batches():
        found = np.maximum(found, np.array(session.run(None, feeds)))
    return dict(zip(names, found.tolist(), strict=True))


def _overflowing(graph: onnx.GraphProto, largest: dict[str, float]) -> dict[str, float]:
    """Nodes that read or write a value beyond LARGEST, with that value."""
    found = {}
    for node in graph.node:
        value = max((largest.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0)
        if not value <= LARGEST:
            found[node.name] = value
    return found


def _join(graph: ir.Graph, in_fp32: set[str]) -> None:
    """Take float32 nodes' operands as they were: the converter casts each to float16 and back."""
    for back in list(graph):
        half = back.inputs[0].producer() if back.op_type == "Cast" and back.inputs[0] else None
        whole = half.inputs[0] if half is not None and half.op_type == "Cast" else None
        if half is None or whole is None or back.attributes.get_int("to", 0) != TensorProto.FLOAT:
            continue
        maker = whole.producer()
        if maker.name in in_fp32 if maker else whole.is_graph_input():
            name = back.outputs[0].name
            back.outputs[0].replace_all_uses_with(whole, replace_graph_outputs=True)
            if whole.is_graph_output():
                back.outputs[0].name, whole.name = f"{name}_cast", name
            for cast in (back, half):
                if not cast.outputs[0].uses():
                    graph.remove(cast, safe=True)


def _magnitude(tensor: TensorProto) -> float:
    values = numpy_helper.to_array(tensor)
    return float(np.abs(values).max()) if values.dtype == np.float32 and values.size else 0.0


def _refuse_non_finite(path: Path, batches: Batches, precision: str) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for feeds in batches():
        if not all(np.isfinite(output).all() for output in session.run(None, feeds)):
            raise UnavailableError(f"{path.stem} gives NaN or Inf in {precision} on the calibration set")
