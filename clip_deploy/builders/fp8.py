"""FP8 (E4M3) matmuls in a fused graph: which can be, their scales, and which an accuracy budget leaves in FP16.

Weights have a scale for each output, activations one from the calibration set. Three kinds of matmul stay in FP16:
attention's, which FP8 makes no faster at these lengths; those whose input is written by something that cannot round it
in passing, since a pass of its own costs what FP8 saves; and the projection, which gives the embedding itself.
"""

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from clip_deploy.builders.sensitivity import FP8, FP8_OPSET, MAX_FP8, Rounding, Switched, rounded_to_fp8, search
from clip_deploy.core.config import AccuracyBudget, Device
from clip_deploy.core.model import Model
from clip_deploy.core.records import Search
from clip_deploy.data.preprocessed import Prepared, feeds
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.ir_tools import array, initializer, made_by
from clip_deploy.rewrites.half_precision import SCAN_ROWS, Batches, ranges

ROUNDING_OPS = {"LayerNormalization", "SkipLayerNormalization", "MultiHeadAttention", *onnx_file.GELU}
ALIGNMENT = 16  # numbers: what tensor cores read of a row at once
HEADROOM = 1.5  # what a deployment's activations may exceed the calibration set's by; beyond it they are cut off

Scales = dict[str, float]  # of a matmul's input, by the matmul's name


def choose(
    graphs: dict[str, Path],
    model: Model,
    calibration: Prepared,
    budget: AccuracyBudget | None,
    seed: int,
    device: Device,
) -> tuple[dict[str, Scales], Search | None]:
    """By tower, the matmuls of its fused float32 graph to quantise, and what the search for `budget` found.

    Where there is no budget, or a model of random weights, that is all that can be.
    """
    scales = {}
    for tower, path in graphs.items():
        inputs = calibration.inputs(tower, model.text_inputs)
        scales[tower] = input_scales(path, partial(feeds, inputs, SCAN_ROWS), device)
    if budget is None or not model.trained:
        return scales, None
    zero = np.zeros((), FP8)
    rounding = {
        tower: Rounding({name: (np.array(scale, np.float32), zero) for name, scale in found.items()}, fp8=True)
        for tower, found in scales.items()
    }
    work = next(iter(graphs.values())).parent
    named = {tower: _named(path, work / f"{tower}-named.onnx") for tower, path in graphs.items()}
    found = search(Switched(named, rounding, model.text_inputs, work), calibration, budget, seed)
    kept = set(found.left_in_float)
    return {
        tower: {name: scale for name, scale in own.items() if f"{tower}: {name}" not in kept}
        for tower, own in scales.items()
    }, found


def input_scales(path: Path, batches: Batches, device: Device) -> Scales:
    """The scale of each matmul's input that can be in FP8, from the largest value on the calibration set."""
    model = onnx.load(path)
    onnx_file.name_nodes(model)
    del model.graph.value_info[:]  # the fusions leave stale types
    largest = ranges(model, path.stem, batches, path.parent, device)
    nodes = [node for node in ir.from_proto(model).graph if _is_eligible(node)]
    return {node.name or "": max(largest[node.inputs[0].name], 1e-6) * HEADROOM / MAX_FP8 for node in nodes}


def _is_eligible(node: ir.Node) -> bool:
    weight = array(node.inputs[1]) if node.op_type == "MatMul" else None
    if weight is None or weight.ndim != 2 or any(size % ALIGNMENT for size in weight.shape):
        return False
    writer = made_by(node.inputs[0])
    return writer is not None and writer.op_type in ROUNDING_OPS and not node.outputs[0].is_graph_output()


def _named(path: Path, output: Path) -> Path:
    model = onnx.load(path)
    onnx_file.name_nodes(model)
    onnx_file.save(ir.from_proto(model), output)
    return output


def quantise(path: Path, scales: Scales) -> Scales:
    """Put the matmuls that `scales` names between FP8 and back, in place; return those without what is in float32.

    `path` is the graph in float16. A weight is stored in FP8, so the file shrinks by half.
    """
    model = onnx_file.load(path)
    graph, written, done = model.graph, {}, dict(scales)
    zero = initializer(graph, "fp8_zero", np.zeros((), FP8))
    for node in [node for node in graph if node.name in scales]:
        hidden, weight = node.inputs[0], array(node.inputs[1])
        if weight is None or weight.dtype != np.float16 or hidden is None:
            del done[node.name or ""]
            continue
        if hidden not in written:
            scale = initializer(graph, f"{hidden.name}_scale", np.array(scales[node.name or ""], np.float16))
            rounded = _insert(graph, node, "QuantizeLinear", [hidden, scale, zero], f"{hidden.name}_fp8")
            written[hidden] = _insert(graph, node, "DequantizeLinear", [rounded, scale, zero], f"{hidden.name}_rounded")
        node.replace_input_with(0, written[hidden])
        values, factors = rounded_to_fp8(weight)
        stored = [
            initializer(graph, f"{node.name}_weight_{part}", content)
            for part, content in (("fp8", values), ("scale", factors.astype(np.float16)))
        ]
        node.replace_input_with(1, _insert(graph, node, "DequantizeLinear", stored, f"{node.name}_weight", axis=1))
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    onnx_file.raise_opset(model, FP8_OPSET)
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink()
    onnx_file.save(model, path)
    return done


def _insert(
    graph: ir.Graph, node: ir.Node, kind: str, inputs: list[ir.Value], output: str, **attributes: int
) -> ir.Value:
    made = ir.node(kind, inputs, attributes)
    made.outputs[0].name = output
    graph.insert_before(node, made)
    return made.outputs[0]
