import sys

import pytest

from clip_deploy.artifact import Target, build, read_target
from clip_deploy.config import AccuracyBudget, Gate, GatesConfig, OpenVinoConfig, Precision
from clip_deploy.errors import UnavailableError
from clip_deploy.openvino_export import export_openvino
from clip_deploy.prepared import load_prepared
from clip_deploy.validation import validate

GATES = GatesConfig(
    fp32=Gate(min_cosine=0.9999),
    bf16=Gate(min_cosine=0.99, max_flips=5),
    int8=Gate(min_cosine=0.9, max_top1_drop=3, max_flips=8),
)


@pytest.fixture
def convert(checkpoint, sets, tmp_path):
    def run(source=checkpoint, **settings):
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
    assert check(folder, sets)["reasons"] == [reason]


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
    with pytest.raises(UnavailableError, match="no bfloat16 instructions on this CPU"):
        export_openvino(None, OpenVinoConfig(precision=Precision.bf16), None, 0, None)


def test_fp32_runs_at_every_shape_and_gives_the_references_embeddings(convert, sets):
    pytest.importorskip("openvino")
    record = check(convert(), sets)
    assert record["status"] == "pass", record["reasons"]
    assert record["parity"]["vision"]["cosine_min"] > 0.99999


def test_bf16_files_are_half_as_large(convert, sets):
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    record = check(convert(precision=Precision.bf16), sets)
    assert record["status"] == "pass", record["reasons"]
    assert record["size_mb"] < 2.5
    assert record["parity"]["vision"]["cosine_min"] < 0.999999


@pytest.mark.parametrize("budget", [None, AccuracyBudget(max_top1_drop=2, max_flips=5)])
def test_int8_is_calibrated_by_nncf_within_the_budget(convert, sets, budget):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    folder = convert(precision=Precision.int8, accuracy_budget=budget)
    record = check(folder, sets)
    assert record["status"] == "pass", record["reasons"]
    assert record["size_mb"] < 2
    facts = read_target(folder).build
    assert ("budget_spent_by_vision" in facts) == (budget is not None)


def test_siglip_with_its_pooling_head_converts(convert, siglip):
    pytest.importorskip("openvino")
    assert read_target(convert(source=siglip)).unavailable is None
