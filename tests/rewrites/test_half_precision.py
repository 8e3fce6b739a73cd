import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from clip_deploy.core.config import Device
from clip_deploy.core.errors import UnavailableError
from clip_deploy.rewrites import half_precision
from clip_deploy.rewrites.half_precision import clamp_masks, ranges, to_float16

ROWS = np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4)


def batches():
    yield {"x": ROWS[:3]}
    yield {"x": ROWS[3:]}


@pytest.fixture
def graph(tmp_path):
    """A graph of named steps: product, "up" times a factor, exact GELU, "down" divided by it again, product."""

    def write(factor, last=1.0):
        rng = np.random.default_rng(0)
        weights = {
            "first": rng.normal(size=(4, 4)),
            "factor": np.array(factor),
            "inverse": np.array(1 / factor),
            "last": last * rng.normal(size=(4, 4)),
        }
        nodes = [
            helper.make_node("MatMul", ["x", "first"], ["a"]),
            helper.make_node("Mul", ["a", "factor"], ["up"]),
            helper.make_node("Gelu", ["up"], ["b"], domain="com.microsoft"),
            helper.make_node("Mul", ["b", "inverse"], ["down"]),
            helper.make_node("MatMul", ["down", "last"], ["y"]),
        ]
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
        constants = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
        model = helper.make_model(
            helper.make_graph(nodes, "g", values[:1], values[1:], constants),
            opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)],
            ir_version=9,
        )
        path = tmp_path / "vision.onnx"
        onnx.save(model, path)
        return path

    return write


def run(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feeds)[0] for feeds in batches()])


def test_ranges_are_the_largest_values_of_all_batches(graph, tmp_path):
    found = ranges(onnx.load(graph(1000.0)), "vision", batches, tmp_path)
    product = ROWS @ np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    assert found["a"] == pytest.approx(np.abs(product).max(), rel=1e-5)
    assert found["up"] == pytest.approx(1000 * np.abs(product).max(), rel=1e-5)


def test_nodes_that_would_overflow_stay_in_fp32_and_are_named(graph):
    path = graph(1e6)
    expected = run(path)
    kept = to_float16(path, batches)
    assert list(kept) == ["Mul_1", "Gelu_2", "Mul_3"]
    assert min(kept.values()) > half_precision.MAX_FLOAT16
    assert np.abs(run(path) - expected).max() < 2e-3 * np.abs(expected).max()
    halves = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert halves["first_float16"] == halves["last_float16"] == TensorProto.FLOAT16
    assert halves["factor"] == TensorProto.FLOAT


def test_a_value_that_float16_holds_with_little_room_stays_in_fp32_too(graph):
    path = graph(1.0)
    largest = max(ranges(onnx.load(path), "vision", batches, path.parent).values())
    assert to_float16(graph(40_000 / largest), batches)
    assert not to_float16(graph(20_000 / largest), batches)


def test_nothing_stays_in_fp32_without_need(graph):
    path = graph(2.0)
    assert to_float16(path, batches) == {}
    assert {tensor.data_type for tensor in onnx.load(path).graph.initializer} == {TensorProto.FLOAT16}
    assert {value.type.tensor_type.elem_type for value in onnx.load(path).graph.output} == {TensorProto.FLOAT}


def test_nodes_that_are_to_be_kept_stay_in_fp32_though_they_would_fit(graph):
    path = graph(2.0)
    assert to_float16(path, batches, ["vision: MatMul_0", "text: MatMul_4"]) == {}
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert (stored["first"], stored["last_float16"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)


def test_where_there_is_no_gpu_the_cpu_finds_the_ranges_of_a_gpus_target(graph, monkeypatch):
    def refuse():
        raise UnavailableError("no CUDA device")

    monkeypatch.setattr(half_precision, "load_cuda", refuse)
    assert list(to_float16(graph(40_000.0), batches, device=Device.cuda)) == list(to_float16(graph(40_000.0), batches))


@pytest.mark.gpu
def test_a_gpu_finds_the_ranges_that_the_cpu_finds(graph, tmp_path):
    model = onnx.load(graph(1000.0))
    found, on_gpu = (ranges(model, "vision", batches, tmp_path, device) for device in (Device.cpu, Device.cuda))
    assert on_gpu == pytest.approx(found, rel=0.01)  # products in TF32


def test_a_graph_that_gives_nan_is_refused(graph):
    with pytest.raises(UnavailableError, match="vision gives NaN or Inf in FP32 on the calibration set"):
        to_float16(graph(2.0, last=np.nan), batches)


def test_floats_that_an_integer_is_found_by_stay_in_fp32(tmp_path):
    """The larger of 4096 and 4097 is a matter of FP32: FP16 holds neither apart."""
    nodes = [
        helper.make_node("Add", ["x", "far"], ["score"]),
        helper.make_node("ArgMax", ["score"], ["place"], axis=1, keepdims=1),
        helper.make_node("Mul", ["x", "factor"], ["product"]),
        helper.make_node("GatherElements", ["product", "place"], ["y"], axis=1),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "y")]
    constants = [numpy_helper.from_array(np.float32(value), name) for name, value in (("far", 4096), ("factor", 2))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "g.onnx")
    rows = {"x": np.array([[0, 1], [1, 0]], np.float32)}
    assert to_float16(tmp_path / "g.onnx", lambda: [rows]) == {}
    assert onnxruntime.InferenceSession(tmp_path / "g.onnx").run(None, rows)[0].tolist() == [[2], [2]]
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "g.onnx").graph.initializer}
    assert stored == {"far": TensorProto.FLOAT, "factor_float16": TensorProto.FLOAT16}


def test_inputs_and_outputs_that_float16_cannot_hold_never_become_float16(graph):
    path = graph(2.0, last=1e6)
    expected = run(path)
    assert "MatMul_4" in to_float16(path, batches)
    assert np.abs(run(path) - expected).max() < 2e-3 * np.abs(expected).max()
    large = [{"x": 1e5 * ROWS}]
    path = graph(1e-6)
    before = onnxruntime.InferenceSession(path).run(None, large[0])[0]
    assert "MatMul_0" in to_float16(path, lambda: large)
    after = onnxruntime.InferenceSession(path).run(None, large[0])[0]
    assert np.abs(after - before).max() < 5e-3 * np.abs(before).max()


def test_a_conversion_that_breaks_the_outputs_is_refused(graph, monkeypatch):
    def spoil(model, path, *_):
        last = next(tensor for tensor in model.graph.initializer if tensor.name == "last")
        last.CopyFrom(numpy_helper.from_array(np.full((4, 4), np.inf, np.float32), "last"))
        onnx.save(model, path)

    monkeypatch.setattr(half_precision, "_cast_down", spoil)
    with pytest.raises(UnavailableError, match="vision gives NaN or Inf in FP16 on the calibration set"):
        to_float16(graph(2.0), batches)


@pytest.mark.parametrize("lowest", [np.finfo(np.float32).min, -np.inf])
def test_masks_are_clamped_to_what_float16_holds(lowest, tmp_path):
    mask = np.array([[0, lowest], [0, 0]], np.float32)
    nodes = [
        helper.make_node("Constant", [], ["inline"], value=numpy_helper.from_array(mask)),
        helper.make_node("Add", ["x", "mask"], ["a"]),
        helper.make_node("Add", ["a", "inline"], ["b"]),
        helper.make_node("Softmax", ["b"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [numpy_helper.from_array(mask, "mask")])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    feeds = {"x": np.eye(2, dtype=np.float32)}
    before = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]
    assert clamp_masks(model)
    assert model.graph.initializers["mask"].const_value.numpy().min() == half_precision.MASKED_SCORE
    after = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]
    assert (after == before).all()
    assert not clamp_masks(model)
