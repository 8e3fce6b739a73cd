"""A graph with one node that INT8 ruins: an activation of one channel is a thousand times the others."""

import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clip_deploy.builders.quantize import prepare, quantize
from clip_deploy.builders.smooth_quant import smooth
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import AccuracyBudget, Quantization, QuantizeConfig
from clip_deploy.core.environment import hardware
from clip_deploy.core.similarity import row_cosines
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.accuracy import flips
from clip_deploy.evaluate.embeddings import encode_set
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.runtimes import open_encoder

HERE = hardware().instruction_sets  # INT8 made for another CPU saturates on one without VNNI
OUTLIER = 3000.0


@pytest.fixture(scope="module")
def calibration(sets):
    return load_prepared(sets / "calibration")


@pytest.fixture(scope="module")
def planted(fused, tmp_path_factory):
    """The same function with an outlier between a LayerNormalization and its product, and the product's name."""
    folder = tmp_path_factory.mktemp("planted") / "ort-fp32"
    shutil.copytree(fused, folder)
    prepare(fused / "vision.onnx", folder / "vision.onnx")
    model = onnx.load(folder / "vision.onnx")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    norm, product = next(
        (node, readers[node.output[0]][0])
        for node in model.graph.node
        if node.op_type == "LayerNormalization" and [reader.op_type for reader in readers[node.output[0]]] == ["MatMul"]
    )
    for name in norm.input[1:]:
        scale(constants[name], np.s_[5], OUTLIER)
    scale(constants[product.input[1]], np.s_[5, :], 1 / OUTLIER)
    onnx.save(model, folder / "vision.onnx")
    return folder, f"vision: {product.name}"


def scale(tensor, where, factor):
    array = numpy_helper.to_array(tensor).copy()
    array[where] *= factor
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def quantised(source, calibration, output, **settings):
    chosen = QuantizeConfig(source="ort-fp32", **settings)
    build(output, lambda folder: quantize(source, chosen, calibration, HERE, 0, folder), Target("ort", "int8"))
    return read_target(output)


def embeddings(folder, prepared):
    return encode_set(open_encoder(folder), prepared)


BUDGET = AccuracyBudget(max_top1_drop=0.0, max_flips=0.0)


@pytest.mark.parametrize("method", [Quantization.dynamic, Quantization.static])
def test_the_node_that_int8_ruins_is_found_and_left_in_float(planted, fused, calibration, tmp_path, method):
    source, name = planted
    target = quantised(source, calibration, tmp_path / "within", method=method, accuracy_budget=BUDGET)
    found = target.search
    assert next(iter(found.sensitivity)) == name
    assert name in found.left_in_float
    assert len(found.left_in_float) < found.nodes / 2
    assert target.build["left_in_float"] == len(found.left_in_float)
    reference = embeddings(fused, calibration)
    assert found.flips == flips(embeddings(tmp_path / "within", calibration), reference, calibration) == 0
    quantised(source, calibration, tmp_path / "all", method=method)
    assert flips(embeddings(tmp_path / "all", calibration), reference, calibration) > 0


def test_the_curve_goes_from_all_in_float_to_all_in_int8(planted, calibration, tmp_path):
    source, _ = planted
    target = quantised(source, calibration, tmp_path / "int8", accuracy_budget=BUDGET)
    curve = target.search.curve
    shares = [point.share for point in curve]
    assert (shares[0], shares[-1]) == (0, 1)
    assert shares == sorted(shares)
    assert (curve[0].flips, curve[0].top1_drop, curve[0].cosine) == (0, 0, 1)
    assert curve[-1].cosine < min(point.cosine for point in curve[:-1])
    assert curve[-1].flips > 0


def test_a_budget_that_all_nodes_meet_leaves_none_in_float(fused, calibration, tmp_path):
    generous = AccuracyBudget()
    target = quantised(fused, calibration, tmp_path / "int8", accuracy_budget=generous)
    assert target.search.left_in_float == []
    assert target.search.nodes == sum(
        len(onnx_file.quantisable(onnx.load(fused / f"{tower}.onnx").graph)) for tower in ("vision", "text")
    )
    plain = quantised(fused, calibration, tmp_path / "plain")
    assert plain.search is None
    for tower in ("vision", "text"):
        assert (tmp_path / f"int8/{tower}.onnx").read_bytes() == (tmp_path / f"plain/{tower}.onnx").read_bytes()


def test_smoothing_keeps_the_function_and_takes_the_outlier_away(planted, calibration, tmp_path):
    source, _ = planted
    prepare(source / "vision.onnx", tmp_path / "vision.onnx")
    inputs = {"pixel_values": np.array(calibration.pixel_values)}
    before = onnx_file.run(tmp_path / "vision.onnx", inputs)
    assert smooth(tmp_path / "vision.onnx", 0.5, Once(inputs)) > 0
    after = onnx_file.run(tmp_path / "vision.onnx", inputs)
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()
    onnx_file.check(tmp_path / "vision.onnx")
    cosines = {}
    for share in (None, 0.5):
        output = tmp_path / f"int8-{share}"
        quantised(source, calibration, output, method=Quantization.static, smooth_quant=share)
        cosines[share] = row_cosines(embeddings(output, calibration).images, before).min()
    assert cosines[None] < 0.9 < 0.99 < cosines[0.5]


class Once:
    def __init__(self, feeds):
        self.feeds = [feeds]

    def get_next(self):
        return self.feeds.pop() if self.feeds else None
