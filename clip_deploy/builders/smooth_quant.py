"""SmoothQuant: move the range of outlying activations into the weights behind (Xiao et al., 2022, arXiv:2211.10438).

A LayerNormalization that feeds matmuls only is divided, channel by channel, by what multiplies the rows of their
weights: the result stays the same, and its input has no outliers left.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader

from clip_deploy.onnx_graph import onnx_file

MIN_SCALE = 1e-5  # of a channel's range


def smooth(path: Path, share: float, reader: CalibrationDataReader) -> int:
    """Smooth a graph in place; return how many LayerNormalizations were divided.

    Args:
        path: the graph.
        share: alpha of the paper: 0 leaves all range with the activations, 1 moves all of it into the weights.
        reader: calibration inputs.
    """
    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    groups = _groups(model.graph, set(weights))
    ranges = _ranges(model, [norm.output[0] for norm, _ in groups], reader)
    for norm, matmuls in groups:
        rows = np.max([np.abs(numpy_helper.to_array(weights[node.input[1]])).max(axis=1) for node in matmuls], axis=0)
        factor = np.maximum(ranges[norm.output[0]], MIN_SCALE) ** share / np.maximum(rows, MIN_SCALE) ** (1 - share)
        for index in range(1, len(norm.input)):
            _replace(model.graph, norm, index, numpy_helper.to_array(weights[norm.input[index]]) / factor)
        for node in matmuls:
            _replace(model.graph, node, 1, numpy_helper.to_array(weights[node.input[1]]) * factor[:, None])
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    large = path.with_name(f"{path.name}.data").exists()
    onnx.save(model, path, save_as_external_data=large, location=f"{path.name}.data")
    return len(groups)


def _groups(graph: onnx.GraphProto, constants: set[str]) -> list[tuple[onnx.NodeProto, list[onnx.NodeProto]]]:
    """Each LayerNormalization that only matmuls with constant weights read, with those matmuls."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        readers = users.get(node.output[0], []) if node.op_type == "LayerNormalization" else []
        if readers and all(reader.op_type == "MatMul" and reader.input[1] in constants for reader in readers):
            found.append((node, readers))
    return found


def _ranges(model: onnx.ModelProto, names: list[str], reader: CalibrationDataReader) -> dict[str, np.ndarray]:
    """Largest absolute value of each channel, over all calibration rows."""
    copy = onnx_file.copy_of(model)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnx_file.open_session(copy.SerializeToString())
    found: dict[str, np.ndarray] = {}
    while (feeds := reader.get_next()) is not None:
        for name, values in zip(names, session.run(names, feeds), strict=True):
            largest = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
            found[name] = np.maximum(found.get(name, largest), largest)
    return found


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, index: int, content: np.ndarray) -> None:
    """Give a node an own constant: equal weights of several nodes are stored once."""
    name = f"{node.name}/smooth_{index}"
    graph.initializer.append(numpy_helper.from_array(content.astype(np.float32), name))
    node.input[index] = name
