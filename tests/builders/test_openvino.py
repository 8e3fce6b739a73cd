import sys

import numpy as np
import pytest

from clip_deploy.builders import openvino as openvino_export
from clip_deploy.builders.openvino import export_openvino
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import AccuracyBudget, GateLimits, GatesConfig, OpenVinoConfig, Precision
from clip_deploy.core.errors import UnavailableError
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.validation import validate
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.runtimes import open_encoder

GATES = GatesConfig(
    fp32=GateLimits(min_cosine=0.9999),
    bf16=GateLimits(min_cosine=0.99, max_flips=5),
    int8=GateLimits(min_cosine=0.9, max_top1_drop=3, max_flips=8),
)


@pytest.fixture
def convert(onnx_target, sets, tmp_path):
    def run(source=onnx_target, **settings):
        chosen, calibration = OpenVinoConfig(**settings), load_prepared(sets / "calibration")
        output, fallback = tmp_path / "openvino", Target("openvino", chosen.precision.value)
        build(output, lambda folder: export_openvino(source, chosen, calibration, 0, folder), fallback)
        return output

    return run


def check(folder, sets):
    return validate(folder, load_prepared(sets / "evaluation"), sets / "evaluation" / "reference.npz", GATES, 0)


def test_a_missing_library_makes_an_unavailable_row_that_says_how_to_install_it(convert, sets, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    folder = convert()
    reason = "openvino is not installed: pip install '.[openvino]'"
    assert read_target(folder).unavailable == reason
    assert check(folder, sets).reasons == [reason]


def test_openvino_alone_is_not_enough_for_int8(convert, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", type("openvino", (), {}))
    monkeypatch.setitem(sys.modules, "nncf", None)
    folder = convert(precision=Precision.int8)
    assert read_target(folder).unavailable == "nncf is not installed: pip install '.[openvino]'"


def test_a_cpu_without_bfloat16_is_named(convert, monkeypatch):
    class Core:
        def get_property(self, device, name):
            return ["FP32", "INT8"]

    monkeypatch.setitem(sys.modules, "openvino", type("openvino", (), {"Core": Core}))
    with pytest.raises(UnavailableError, match="this CPU has no bfloat16 instructions"):
        export_openvino(None, OpenVinoConfig(precision=Precision.bf16), None, 0, None)


def test_fp32_runs_at_every_shape_and_gives_the_references_embeddings(convert, sets):
    pytest.importorskip("openvino")
    record = check(convert(), sets)
    assert record.status == "pass", record.reasons
    assert record.measured.parity["vision"].cosine_min > 0.99999


def test_bf16_files_are_half_as_large(convert, sets):
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    record = check(convert(precision=Precision.bf16), sets)
    assert record.status == "pass", record.reasons
    assert record.size_mb < 2.5
    assert record.measured.parity["vision"].cosine_min < 0.999999


@pytest.mark.parametrize("budget", [None, AccuracyBudget(max_top1_drop=2, max_flips=5)])
def test_int8_is_calibrated_by_nncf_within_the_budget(convert, sets, budget):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    folder = convert(precision=Precision.int8, accuracy_budget=budget)
    record = check(folder, sets)
    assert record.status == "pass", record.reasons
    assert record.size_mb < 2
    facts = read_target(folder).build
    assert ("budget_spent_by_vision" in facts) == (budget is not None)


def test_every_family_gives_what_its_onnx_graphs_give(convert, family, onnx_of):
    pytest.importorskip("openvino")
    source = onnx_of(family)
    folder = convert(source=source)
    target, encoder = read_target(folder), open_encoder(folder)
    assert "rewrites_undone" not in target.build
    encode = {"vision": encoder.encode_images, "text": encoder.encode_texts}
    for tower in ("vision", "text"):
        inputs = onnx_file.random_feeds(source / f"{tower}.onnx", target.model.example_texts)
        given = [inputs.get(name, np.ones((1, 1))) for name in ("input_ids", "attention_mask")]
        actual = encode[tower](*([inputs["pixel_values"]] if tower == "vision" else given))
        expected = onnx_file.run(source / f"{tower}.onnx", inputs)
        assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


def test_what_stands_around_the_towers_is_left_out(convert, checkpoint, onnx_of, sets):
    pytest.importorskip("openvino")
    source = onnx_of(checkpoint, preprocess=True, normalize=True, classifier=["a red circle", "a blue square"])
    record = check(convert(source=source), sets)
    assert record.status == "pass", record.reasons


def test_a_source_that_could_not_be_built_is_named(convert, monkeypatch, tmp_path):
    def refuse(folder):
        raise UnavailableError("the dynamo exporter failed")

    monkeypatch.setitem(sys.modules, "openvino", type("openvino", (), {}))
    build(tmp_path / "onnx-fp32", refuse, Target("ort", "fp32"))
    assert read_target(convert(source=tmp_path / "onnx-fp32")).unavailable == "onnx-fp32: the dynamo exporter failed"


def test_accuracy_control_takes_over_where_the_fastest_arrangement_breaks_the_budget(convert, sets, monkeypatch):
    pytest.importorskip("nncf")
    spent = iter([2.0, 2.0, 0.5, 0.5] * 20)
    monkeypatch.setattr(openvino_export, "_budget_spent", lambda *_: lambda *_: (-next(spent), None))
    folder = convert(precision=Precision.int8, accuracy_budget=AccuracyBudget(max_top1_drop=0, max_flips=0))
    facts = read_target(folder).build
    assert read_target(folder).unavailable is None
    assert facts["vision_arrangement"] == "SmoothQuant and accuracy control"
    assert check(folder, sets).status == "pass"
