"""FP8 is judged without a GPU: the graph that is built is held against ONNX Runtime's own reading of it."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.project import ROOT

from clip_deploy.builders import fp8
from clip_deploy.builders.fused import optimize
from clip_deploy.builders.sensitivity import rounded_to_fp8
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import (
    AccuracyBudget,
    GateLimits,
    OptimizeConfig,
    Precision,
    Provider,
    load_choice,
    load_params,
)
from clip_deploy.core.errors import ConfigError, UnavailableError
from clip_deploy.core.similarity import row_cosines
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.embeddings import encode_images, encode_texts
from clip_deploy.evaluate.validation import validate
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.runtimes import fused, open_encoder

BUDGET = AccuracyBudget(max_top1_drop=1.0, max_flips=2.0)


def settings(**changes):
    chosen = {"precision": Precision.fp8, "provider": Provider.torch, "skip_layer_norm": True, **changes}
    return OptimizeConfig(**chosen)


@pytest.fixture(scope="module")
def calibration(sets):
    return load_prepared(sets / "calibration")


@pytest.fixture(scope="module")
def target(onnx_target, calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "torch-fused-fp8"
    build(folder, lambda output: optimize(onnx_target, settings(accuracy_budget=BUDGET), calibration, output), None)
    return folder


def test_a_matmul_in_fp8_stands_between_two_roundings(target):
    graph = onnx_file.load(target / "vision.onnx")
    onnx_file.check(target / "vision.onnx")
    assert graph.opset_imports[""] >= 19
    dequantised = [node for node in graph.graph if node.op_type == "DequantizeLinear"]
    weights = [node for node in dequantised if node.inputs[0].is_initializer()]
    assert len(weights) == 16  # four of each layer; patches and projection stay in FP16
    assert {node.inputs[0].dtype for node in weights} == {ir.DataType.FLOAT8E4M3FN}
    assert {node.inputs[1].shape[0] for node in weights} == {node.inputs[0].shape[1] for node in weights}


def test_the_simulation_gives_what_onnx_runtime_makes_of_the_graph(target, calibration):
    simulated = open_encoder(target)
    model = read_target(target).model
    for tower, encode in (("vision", simulated.encode_images), ("text", simulated.encode_texts)):
        feeds = {name: np.array(rows[:8]) for name, rows in calibration.inputs(tower, model.text_inputs).items()}
        expected = onnx_file.open_session(target / f"{tower}.onnx").run(None, feeds)[0]
        assert row_cosines(encode(*feeds.values()), expected).min() > 0.9995


def test_fp8_keeps_the_embeddings_and_halves_the_file(target, onnx_target, calibration):
    described, reference = read_target(target), open_encoder(onnx_target)
    assert (described.precision, described.device, described.runtime) == ("fp8", "cpu", "fused")
    assert described.build["fp8_matmuls"] == described.search.nodes - len(described.search.left_in_float)
    simulated = open_encoder(target)
    images = calibration.pixel_values[:32]
    cosines = row_cosines(encode_images(simulated, images), encode_images(reference, images))
    texts = row_cosines(encode_texts(simulated, calibration.prompts), encode_texts(reference, calibration.prompts))
    assert 0.98 < cosines.min() < 0.99999
    assert 0.98 < texts.min() < 0.99999
    assert (target / "vision.onnx").stat().st_size < 0.4 * (onnx_target / "vision.onnx").stat().st_size


def test_what_breaks_the_budget_stays_in_fp16(onnx_target, calibration, tmp_path, monkeypatch):
    """Scales that are far too small cut activations off: the search finds that nearly all must stay."""
    whole = fp8.input_scales
    monkeypatch.setattr(fp8, "input_scales", lambda *given: {name: scale / 30 for name, scale in whole(*given).items()})
    found = optimize(onnx_target, settings(accuracy_budget=BUDGET), calibration, tmp_path)
    assert len(found.search.left_in_float) > 5
    assert found.search.top1_drop <= BUDGET.max_top1_drop
    written = {
        f"{tower}: {node.name}"
        for tower in ("vision", "text")
        for node in onnx_file.load(tmp_path / f"{tower}.onnx").graph
        if _in_fp8(node)
    }
    assert written
    assert not written & set(found.search.left_in_float)


def test_a_node_that_is_kept_in_float32_is_not_rounded(target, onnx_target, calibration, tmp_path):
    rounded = [node.name for node in onnx_file.load(target / "text.onnx").graph if _in_fp8(node)]
    kept = f"text: {rounded[0]}"
    found = optimize(onnx_target, settings(keep_fp32=[kept]), calibration, tmp_path)
    left = [node.name for node in onnx_file.load(tmp_path / "text.onnx").graph if _in_fp8(node)]
    assert left == rounded[1:]
    assert found.build["keep_fp32"] == [kept]
    assert found.build["fp8_matmuls"] == read_target(target).build["fp8_matmuls"] - 1


def _in_fp8(node):
    return node.op_type == "MatMul" and node.inputs[1].producer() is not None


def test_weights_have_a_scale_for_each_output_that_float16_holds():
    weight = np.array([[448.0, 1e-3], [-224.0, -2e-3], [3.0, 0.0]], np.float32)
    values, scale = rounded_to_fp8(weight)
    assert values.dtype == ml_dtypes.float8_e4m3fn
    assert np.array_equal(scale, scale.astype(np.float16))
    np.testing.assert_allclose(values.astype(np.float32) * scale, weight, rtol=0.07)


def test_a_gpu_without_fp8_units_is_named(monkeypatch):
    monkeypatch.setattr(fused.torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(fused.torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(UnavailableError, match=r"NVIDIA A100 has no FP8 units \(compute capability 8\.0"):
        fused.require_fp8(Target("fused", "fp8", device="cuda"))
    fused.require_fp8(Target("fused", "fp16", device="cuda"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provider": Provider.own}, "precision fp8 is for provider torch alone, not own"),
        ({"precision": Precision.fp16, "accuracy_budget": BUDGET}, "accuracy_budget belongs to fp8, not to fp16"),
        ({"precision": Precision.int8}, "precision is int8; accepted are fp32, fp16, bf16, fp8"),
    ],
)
def test_settings_that_do_not_go_with_fp8_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_fp8_may_be_judged_on_a_cpu(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    line = "  ort-fp32: {source: onnx-fp32, precision: fp32}\n"
    added = "  torch-fused-fp8: {source: onnx-fp32, precision: fp8, provider: torch}\n"
    params = tmp_path / "params.yaml"
    params.write_text(text.replace(line, line + added))
    assert load_params(params, ROOT / "conf").optimize["torch-fused-fp8"].precision is Precision.fp8


def test_a_target_that_misses_its_gate_names_the_way_out(target, sets):
    limits = replace(load_choice(ROOT / "conf", "gates", "standard"), fp8=GateLimits(min_cosine=0.99999))
    folder = sets / "evaluation"
    record = validate(target, load_prepared(folder), folder / "reference.npz", limits, 0)
    assert record.status == "fail"
    assert record.diagnosis.notes == ["no layer is named: a lower accuracy_budget keeps more of its matmuls in fp16"]


def test_the_target_passes_its_check_and_names_the_opset_that_knows_fp8(target, sets):
    assert read_target(target).opset == 19
    assert onnx.load(target / "text.onnx", load_external_data=False).ir_version >= 9
    limits = load_choice(ROOT / "conf", "gates", "standard")
    folder = sets / "evaluation"
    record = validate(target, load_prepared(folder), folder / "reference.npz", limits, 0)
    assert (record.status, record.reasons) == ("pass", [])
