import numpy as np
import onnx
import pytest

from clip_deploy.builders.quantize import quantize, reduces_range
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import Calibration, Quantization, QuantizeConfig, ReduceRange
from clip_deploy.core.similarity import row_cosines
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.runtimes import open_encoder

VNNI = ["avx2", "avx512_vnni"]


@pytest.mark.parametrize(
    "settings",
    [
        QuantizeConfig(),
        QuantizeConfig(per_channel=False, reduce_range=ReduceRange.always),
        QuantizeConfig(method=Quantization.static),
        QuantizeConfig(method=Quantization.static, calibration=Calibration.percentile),
        QuantizeConfig(method=Quantization.static, calibration=Calibration.entropy),
        QuantizeConfig(method=Quantization.static, symmetric=True),
    ],
    ids=["dynamic", "reduced", "minmax", "percentile", "entropy", "symmetric"],
)
def test_quantised_graphs_are_small_and_close(onnx_target, sets, tmp_path, settings):
    calibration, evaluation = (load_prepared(sets / name) for name in ("calibration", "evaluation"))
    output = tmp_path / "int8"
    build(output, lambda folder: quantize(onnx_target, settings, calibration, VNNI, 0, folder), Target("ort", "int8"))
    sizes = [(folder / "vision.onnx").stat().st_size for folder in (onnx_target, output)]
    assert sizes[1] < 0.4 * sizes[0]
    pixels = np.array(evaluation.pixel_values[:32])
    small, full = (open_encoder(folder).encode_images(pixels) for folder in (output, onnx_target))
    assert row_cosines(small, full).min() > 0.8
    fusion = onnx_file.describe(output / "vision.onnx").fusion
    assert fusion["quantize_linear"] > 0
    assert (fusion["quantized_matmul"] > 0) == (settings.method is Quantization.dynamic)


def test_a_fused_graph_can_be_quantised_too(onnx_target, fused, sets, tmp_path):
    output, calibration = tmp_path / "int8", load_prepared(sets / "calibration")
    build(output, lambda folder: quantize(fused, QuantizeConfig(), calibration, VNNI, 0, folder), Target("ort", "int8"))
    pixels = np.array(load_prepared(sets / "evaluation").pixel_values[:16])
    small, full = (open_encoder(folder).encode_images(pixels) for folder in (output, onnx_target))
    assert row_cosines(small, full).min() > 0.8


def test_every_product_of_a_fused_graph_is_quantised_on_both_sides(fused, sets, tmp_path):
    """The quantiser knows no type of what ONNX Runtime's own operators give, and would leave it in float."""
    output, calibration = tmp_path / "int8", load_prepared(sets / "calibration")
    settings = QuantizeConfig(method=Quantization.static)
    build(output, lambda folder: quantize(fused, settings, calibration, VNNI, 0, folder), Target("ort", "int8"))
    for tower in ("vision", "text"):
        graph = onnx.load(output / f"{tower}.onnx").graph
        makers = {name: node.op_type for node in graph.node for name in node.output}
        products = [[makers.get(name) for name in node.input] for node in graph.node if node.op_type == "MatMul"]
        assert len(products) > 8
        assert all(sides == ["DequantizeLinear"] * 2 for sides in products)


def test_weights_alone_can_be_int8(onnx_target, sets, tmp_path):
    calibration = load_prepared(sets / "calibration")
    settings = QuantizeConfig(method=Quantization.weight_only)
    output = tmp_path / "int8"
    build(output, lambda folder: quantize(onnx_target, settings, calibration, VNNI, 0, folder), Target("ort", "int8"))
    operators = [node.op_type for node in onnx.load(output / "vision.onnx").graph.node]
    assert "MatMulNBits" in operators
    pixels = np.array(calibration.pixel_values)
    small, full = (open_encoder(folder).encode_images(pixels) for folder in (output, onnx_target))
    assert 0.999 < row_cosines(small, full).min() < 1


@pytest.mark.parametrize("method", [Quantization.dynamic, Quantization.weight_only])
def test_nodes_that_are_to_be_kept_stay_products_in_float(onnx_target, sets, tmp_path, method):
    model = onnx.load(onnx_target / "vision.onnx")
    onnx_file.name_nodes(model)
    kept = [node.name for node in onnx_file.quantisable(model.graph) if node.op_type == "MatMul"][:2]
    settings = QuantizeConfig(method=method, keep_fp32=[f"vision: {name}" for name in kept])
    quantize(onnx_target, settings, load_prepared(sets / "calibration"), VNNI, 0, tmp_path)
    written = onnx.load(tmp_path / "vision.onnx").graph
    assert [node.name for node in onnx_file.quantisable(written) if node.op_type == "MatMul"] == kept


@pytest.mark.parametrize(
    ("choice", "instruction_sets", "expected"),
    [
        (ReduceRange.auto, ["avx2"], True),
        (ReduceRange.auto, VNNI, False),
        (ReduceRange.auto, ["asimd", "asimddp"], False),
        (ReduceRange.always, VNNI, True),
        (ReduceRange.never, ["avx2"], False),
    ],
)
def test_the_range_is_reduced_where_the_cpu_would_saturate(choice, instruction_sets, expected):
    assert reduces_range(choice, instruction_sets) is expected


def test_the_target_says_how_it_was_quantised(onnx_target, sets, tmp_path):
    settings = QuantizeConfig(method=Quantization.static)
    calibration = load_prepared(sets / "calibration")
    output = tmp_path / "int8"
    build(output, lambda folder: quantize(onnx_target, settings, calibration, VNNI, 0, folder), Target("ort", "int8"))
    assert read_target(output).build == {
        "opset": 18,
        "exporter": "dynamo",
        "source": "onnx-fp32",
        "method": "static",
        "per_channel": True,
        "calibration": "minmax",
        "calibration_images": 16,
        "symmetric": False,
        "smooth_quant": "no",
        "reduce_range": False,
    }
