"""Which nodes INT8 or FP8 hurts, and the fewest to leave in float so that an accuracy budget holds.

Both towers run with a switch at each matmul: on, its input and weight are rounded as the quantiser rounds them.
One session for each tower serves every question: scanning all nodes costs one pass over a few rows for each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

from clip_deploy.core.config import AccuracyBudget
from clip_deploy.core.model import image_feed
from clip_deploy.core.records import CurvePoint, Search
from clip_deploy.core.similarity import row_cosines
from clip_deploy.data.preprocessed import Prepared
from clip_deploy.evaluate.accuracy import Loss, accuracy_cost, within_budget
from clip_deploy.evaluate.embeddings import encode_set
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.runtimes import text_feed

FP8 = ml_dtypes.float8_e4m3fn
MAX_FP8 = 448.0  # the largest number of E4M3
FP8_OPSET = 19  # QuantizeLinear knows FP8 from here on
SCAN_ROWS = 16  # images, and texts, of the scan
UNTOUCHED = Loss(top1_drop=0.0, flips=0.0, cosine=1.0)
CURVE = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the nodes at which the curve is drawn in any case


@dataclass
class Rounding:
    """How a node's operands are rounded.

    Attributes:
        ranges: scale and zero point of each activation by the node's name; empty where they are found at run time.
        bits: of INT8's weights, 8 or 7; they are symmetric.
        per_channel: one scale for each output, or one for the whole weight.
        fp8: E4M3 instead of INT8, of the matmuls in `ranges` alone.
    """

    ranges: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    bits: int = 8
    per_channel: bool = True
    fp8: bool = False

    def nodes(self, graph: onnx.GraphProto) -> list[str]:
        """Names of the nodes that can be quantised."""
        return [node.name for node in onnx_file.quantisable(graph) if not self.fp8 or node.name in self.ranges]

    def weight(self, weight: np.ndarray, lookup: bool) -> tuple[np.ndarray, np.ndarray]:
        """Rounded values and scales; a table has one scale, a weight [in, out] one for each output if `per_channel`."""
        if self.fp8:
            return rounded_to_fp8(weight)
        limit = 2 ** (self.bits - 1) - 1
        axis = 0 if self.per_channel and not lookup else None
        scale = np.maximum(np.abs(weight).max(axis=axis), 1e-12).astype(np.float32) / limit
        return np.clip(np.round(weight / scale), -limit, limit).astype(np.int8), np.array(scale, np.float32)


def rounded_to_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight [in, out] in FP8 (E4M3) and the scale of each output, float32 [out], which float16 holds exactly."""
    largest = np.abs(weight.astype(np.float32)).max(axis=0)
    scale = np.maximum(largest / MAX_FP8, np.finfo(np.float16).smallest_subnormal).astype(np.float16).astype(np.float32)
    rounded = np.clip(weight.astype(np.float32) / scale, -MAX_FP8, MAX_FP8)
    return rounded.astype(FP8), scale


class Switched:
    """Both towers with a switch at each node, as an encoder: `on` holds the names of the nodes that are quantised."""

    image_input = "pixel_values"

    def __init__(
        self, graphs: dict[str, Path], rounding: dict[str, Rounding], text_inputs: list[str], work: Path
    ) -> None:
        self.text_inputs = text_inputs
        self.on: set[str] = set()
        self.switches: dict[str, list[str]] = {}
        self.sessions = {}
        for tower, path in graphs.items():
            model = onnx.load(path)
            self.switches[tower] = rounding[tower].nodes(model.graph)
            switched = work / f"{tower}-switched.onnx"
            changed = ir.from_proto(with_switches(model, rounding[tower]))
            if rounding[tower].fp8:
                onnx_file.raise_opset(changed, FP8_OPSET)
            onnx_file.save(changed, switched)
            self.sessions[tower] = onnx_file.open_session(switched)

    @property
    def names(self) -> list[str]:
        return [f"{tower}: {name}" for tower, names in self.switches.items() for name in names]

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        return self._run("vision", image_feed(images))

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        return self._run("text", text_feed(self.text_inputs, input_ids, attention_mask))

    def _run(self, tower: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
        switches = {_switch(name): np.array(f"{tower}: {name}" in self.on) for name in self.switches[tower]}
        found: np.ndarray = self.sessions[tower].run(None, feeds | switches)[0]
        return found


def with_switches(model: onnx.ModelProto, rounding: Rounding) -> onnx.ModelProto:
    """Add a boolean input for each node that can be quantised, which chooses between its operands and rounded ones."""
    graph = model.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    chosen = set(rounding.nodes(graph))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name in chosen:
            graph.input.append(helper.make_tensor_value_info(_switch(node.name), TensorProto.BOOL, []))
            lookup = node.op_type == "Gather"
            operand = 0 if lookup else 1
            weight = weights[node.input[operand]]
            _switch_operand(nodes, node, operand, _rounded_weight(graph, nodes, node.name, weight, rounding, lookup))
            if not lookup:
                _switch_operand(nodes, node, 0, _rounded_input(graph, nodes, node, rounding))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return model


def _switch(name: str) -> str:
    return f"{name}/quantised"


def _switch_operand(nodes: list[onnx.NodeProto], node: onnx.NodeProto, index: int, rounded: str) -> None:
    output = f"{node.name}/operand_{index}"
    nodes.append(helper.make_node("Where", [_switch(node.name), rounded, node.input[index]], [output]))
    node.input[index] = output


def _rounded_weight(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto], name: str, weight: np.ndarray, rounding: Rounding, lookup: bool
) -> str:
    rounded, scale = rounding.weight(weight, lookup)
    for suffix, content in (("weight", rounded), ("scale", scale)):
        graph.initializer.append(numpy_helper.from_array(content, f"{name}/{suffix}"))
    nodes.append(
        helper.make_node("DequantizeLinear", [f"{name}/weight", f"{name}/scale"], [f"{name}/rounded_weight"], axis=1)
    )
    return f"{name}/rounded_weight"


def _rounded_input(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto], node: onnx.NodeProto, rounding: Rounding
) -> str:
    source, output = node.input[0], f"{node.name}/rounded_input"
    if node.name in rounding.ranges:
        parts = [f"{node.name}/{suffix}" for suffix in ("input_scale", "input_zero")]
        for part, content in zip(parts, rounding.ranges[node.name], strict=True):
            graph.initializer.append(numpy_helper.from_array(content, part))
        nodes.append(helper.make_node("QuantizeLinear", [source, *parts], [f"{output}/whole"]))
    else:
        parts = [f"{output}/scale", f"{output}/zero"]
        nodes.append(helper.make_node("DynamicQuantizeLinear", [source], [f"{output}/whole", *parts]))
    nodes.append(helper.make_node("DequantizeLinear", [f"{output}/whole", *parts], [output]))
    return output


def scan(encoder: Switched, prepared: Prepared) -> dict[str, float]:
    """1 - mean cosine of the embeddings with one node quantised, for each node, the most sensitive first."""
    texts = prepared.texts[:SCAN_ROWS]
    calls: dict[str, Callable[[], np.ndarray]] = {
        "vision": lambda: encoder.encode_images(np.array(prepared.pixel_values[:SCAN_ROWS])),
        "text": lambda: encoder.encode_texts(texts.input_ids, texts.attention_mask),
    }
    encoder.on = set()
    expected = {tower: call() for tower, call in calls.items()}
    found = {}
    for name in tqdm(encoder.names, desc="sensitivity", disable=None):
        encoder.on, tower = {name}, name.split(": ")[0]
        found[name] = 1 - float(row_cosines(calls[tower](), expected[tower]).mean())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def search(encoder: Switched, prepared: Prepared, budget: AccuracyBudget, seed: int) -> Search:
    """Leave the fewest nodes in float that keep the calibration set's answers within `budget`.

    Nodes are left out in the order of their sensitivity; how many is found by bisection.
    """
    sensitivity = scan(encoder, prepared)
    order = list(sensitivity)
    encoder.on = set()
    reference = encode_set(encoder, prepared)
    known: dict[int, Loss] = {0: UNTOUCHED}  # by the number of quantised nodes

    def loss(left: int) -> Loss:
        count = len(order) - left
        if count not in known:
            encoder.on = set(order[left:])
            known[count] = accuracy_cost(encode_set(encoder, prepared), reference, prepared, seed)
        return known[count]

    low, high = 0, len(order)  # `high` nodes left in float meet the budget
    if within_budget(loss(0), budget):
        high = 0
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if within_budget(loss(middle), budget) else (middle, high)
    for share in CURVE:
        loss(round((1 - share) * len(order)))
    curve = [CurvePoint(count / len(order), **vars(known[count])) for count in sorted(known)]
    return Search(order[:high], len(order), **vars(loss(high)), sensitivity=sensitivity, curve=curve)
