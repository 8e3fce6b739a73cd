"""How close a graph's own preprocessing comes to the checkpoint's processor, pixel by pixel."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from clip_deploy import onnx_graph
from clip_deploy.core.errors import DataError
from clip_deploy.prepared import Prepared, batches
from clip_deploy.shell import FRONT

IMAGES, PIXELS = "images", "pixel_values"
SCALE = f"{FRONT}grey_level"  # what one grey level is worth in pixel_values, by channel
BATCH = 8  # images of one size in one call


def pixel_parity(path: Path, prepared: Prepared) -> dict[str, float]:
    """Hold the preprocessing of the graph in `path` against the prepared pixel_values.

    Returns:
        max_diff and mean_diff in units of 1/255 before normalisation, and differing_percent: pixels, by channel, that
        differ by half a unit or more.
    """
    if prepared.images is None:
        raise DataError("the prepared set holds no images: run `dvc repro` with onnx.preprocess")
    model, scale = front_of(path)
    session = onnx_graph.open_session(ir.to_proto(model).SerializeToString())
    largest, total, differing, count = 0.0, 0.0, 0, 0
    for group in prepared.images.by_size():
        for part in batches(len(group), BATCH):
            rows = group[part]
            actual = session.run(None, {IMAGES: np.stack([prepared.images[row] for row in rows])})[0]
            difference = np.abs(grey_levels(actual, prepared.pixel_values[rows], scale))
            largest, total = max(largest, float(difference.max())), total + float(difference.sum())
            differing, count = differing + int((difference >= 0.5).sum()), count + difference.size
    return {"max_diff": largest, "mean_diff": total / count, "differing_percent": 100 * differing / count}


def grey_levels(actual: np.ndarray, expected: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Difference of pixel_values [images, 3, height, width] in units of 1/255 before normalisation."""
    return (actual.astype(np.float64) - expected) / scale.reshape(1, 3, 1, 1)


def front_of(path: Path) -> tuple[ir.Model, np.ndarray]:
    """The preprocessing of a graph as a model of its own, images -> pixel_values, and its `scale`."""
    model = onnx_graph.load(path)
    graph = model.graph
    front = [node for node in graph if str(node.name).startswith(FRONT)]
    scale = next(node for node in front if node.outputs[0].name == SCALE).attributes["value"].as_tensor().numpy()
    graph.remove(front)
    images = graph.inputs.pop(0)
    opsets = dict(graph.opset_imports)
    own = ir.Graph([images], [front[-1].outputs[0]], nodes=front, opset_imports=opsets, name="preprocess")
    return ir.Model(own, ir_version=model.ir_version), scale
