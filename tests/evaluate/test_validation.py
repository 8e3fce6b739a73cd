import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from dvc.cli import main as dvc_command
from PIL import Image
from support.records import checked, measured, parity, zero_shot
from support.targets import advice, records

from clip_deploy.builders.fused import optimize
from clip_deploy.builders.package import Sources, write_package
from clip_deploy.builders.quantize import quantize
from clip_deploy.builders.torchscript import export_torchscript
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import GateLimits, GatesConfig, OptimizeConfig, Precision, QuantizeConfig
from clip_deploy.core.errors import ConfigError, DataError, UnavailableError
from clip_deploy.core.manifest import Run
from clip_deploy.core.parsing import parse, plain
from clip_deploy.core.records import Search, Validation
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate import validation
from clip_deploy.evaluate.gates import check_gate, failures_now
from clip_deploy.evaluate.validation import validate, validate_apart
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.onnx_graph import onnx_file

GATES = GatesConfig(fp32=GateLimits(min_cosine=0.9999, max_top1_drop=0.1, max_flips=0.5))


@pytest.fixture
def check(sets):
    def run(folder):
        return validate(folder, load_prepared(sets / "evaluation"), sets / "evaluation" / "reference.npz", GATES, 0)

    return run


def test_the_reference_passes_against_itself(check, checkpoint):
    record = check(checkpoint)
    assert record.status == "pass"
    assert record.measured.parity["vision"].cosine_min == pytest.approx(1, abs=1e-6)
    assert record.measured.flips == 0
    assert record.measured.zero_shot.top1 == record.measured.zero_shot.reference_top1


def test_the_calibration_set_is_refused_as_what_targets_are_judged_on(onnx_target, sets):
    folder = sets / "calibration"
    with pytest.raises(DataError, match=r"calibration/reference\.npz is missing: give the evaluation set"):
        validate_apart(onnx_target, load_prepared(folder), folder / "reference.npz", GATES, 0)


def test_an_exported_target_passes_at_every_shape(check, onnx_target):
    record = check(onnx_target)
    assert record.status == "pass", record.reasons
    assert set(record.measured.shapes) == {
        *(f"{tower}, batch {batch}" for tower in ("vision", "text") for batch in (1, 3, 8)),
        "text, 32 tokens",
    }
    assert record.graphs["vision"].opsets == {"ai.onnx": 18}
    assert record.graphs["vision"].fusion["attention_expected"] == 4


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16, Precision.int8])
def test_torchscript_runs_at_every_shape(check, checkpoint, tmp_path, precision):
    output = tmp_path / "torchscript"
    build(output, lambda folder: export_torchscript(checkpoint, precision, folder), Target("torchscript", "fp32"))
    record = check(output)
    assert record.status == "pass", record.reasons
    assert record.precision == precision.value
    assert record.size_mb < {Precision.fp32: 5, Precision.bf16: 2.6, Precision.int8: 2}[precision]


def test_a_set_is_another_one_by_what_top1_is_counted_on(sets):
    prepared, same = (load_prepared(sets / "evaluation") for _ in range(2))
    same.pixel_values, same.contents.pad_token = same.pixel_values[:1], 7  # as another checkpoint makes them
    assert same.identity == prepared.identity
    others = [load_prepared(sets / "evaluation") for _ in range(3)]
    others[0].labels = np.roll(others[0].labels, 1)
    others[1].contents.templates[0] = "a drawing of a {}"
    others[2].contents.sha256[0] = "0" * 64  # of an image
    assert len({prepared.identity, *(other.identity for other in others)}) == 4


def spoiled(onnx_target, folder, change):
    """A copy of the exported target with one weight of the vision tower changed."""
    shutil.copytree(onnx_target, folder)
    model = onnx.load(folder / "vision.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = change(onnx.numpy_helper.to_array(weight).copy())
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, folder / "vision.onnx")
    return folder


def test_a_target_that_drifted_fails_with_the_reason(check, onnx_target, tmp_path):
    noise = np.random.default_rng(0)
    record = check(
        spoiled(onnx_target, tmp_path / "t", lambda array: array + noise.normal(0, 0.3, array.shape).astype("f"))
    )
    assert record.status == "fail"
    assert any(": cosine " in reason and "gates.fp32.min_cosine" in reason for reason in record.reasons)


def test_a_file_that_the_runtime_refuses_fails_with_the_reason(check, onnx_target, tmp_path):
    shutil.copytree(onnx_target, tmp_path / "t")
    (tmp_path / "t" / "vision.onnx").write_bytes(b"no graph")
    record = check(tmp_path / "t")
    assert record.status == "fail"
    assert record.reasons[0].startswith("t does not load: ")


def test_nan_fails(check, onnx_target, tmp_path):
    record = check(spoiled(onnx_target, tmp_path / "t", lambda array: array * np.float32("nan")))
    assert record.status == "fail"
    assert "vision gives NaN or infinity" in record.reasons


def test_a_batch_size_baked_in_fails_with_what_the_runtime_said(check, onnx_target, tmp_path):
    folder = shutil.copytree(onnx_target, tmp_path / "t")
    model = onnx.load(folder / "vision.onnx")
    dimension = model.graph.input[0].type.tensor_type.shape.dim[0]
    dimension.Clear()
    dimension.dim_value = 1
    onnx.save(model, folder / "vision.onnx")
    record = check(folder)
    assert record.status == "fail"
    assert record.reasons[0].startswith("encoding failed: ")


def test_an_opset_other_than_asked_for_fails(check, onnx_target, tmp_path):
    folder = shutil.copytree(onnx_target, tmp_path / "t")
    manifest = folder / "target.json"
    manifest.write_text(manifest.read_text().replace('"opset": 18', '"opset": 20'))
    assert check(folder).reasons == ["vision.onnx declares opset 18, onnx.opset asked for 20"]


def test_an_unavailable_target_keeps_its_row(check, tmp_path):
    def refuse(folder):
        raise UnavailableError("no INT8 kernels here")

    build(tmp_path / "t", refuse, Target("torchscript", "int8"))
    record = check(tmp_path / "t")
    assert (record.status, record.reasons, record.precision) == (
        "unavailable",
        ["no INT8 kernels here"],
        "int8",
    )


def eat_memory(folder):
    raise MemoryError


FAULTS = {
    "the process crashed with SIGTERM": lambda folder: os.kill(os.getpid(), signal.SIGTERM),
    "the process crashed with SIGKILL, which happens when memory runs out": lambda folder: os.kill(
        os.getpid(), signal.SIGKILL
    ),
    "no answer within 2 s: the process hung and was killed": lambda folder: time.sleep(600),
    "MemoryError: memory ran out": eat_memory,
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_runtime_that_crashes_or_hangs_fails_and_leaves_the_pipeline_alone(said, onnx_target, sets, monkeypatch):
    monkeypatch.setattr(validation, "open_encoder", FAULTS[said])
    limit = 2 if "hung" in said else 60  # a busy machine takes its time to start a process
    prepared, gates = load_prepared(sets / "evaluation"), GatesConfig(timeout_s=limit)
    record = validate_apart(onnx_target, prepared, sets / "evaluation" / "reference.npz", gates, 0)
    assert record.status == "fail"
    (reason,) = record.reasons
    assert reason.partition(" (its traceback")[0] == said
    assert record.build["opset"] == 18


def test_a_time_limit_must_be_above_zero():
    with pytest.raises(ConfigError, match=r"gates\.timeout_s is 0"):
        GatesConfig(timeout_s=0)


def test_random_weights_are_held_to_the_cosine_only():
    found = measured(zero_shot=zero_shot(top1_drop=9.0), flips=50.0)
    gate = GateLimits(min_cosine=0.9, max_top1_drop=1.5, max_flips=8)
    assert check_gate(found, False, gate, "int8") == []
    assert check_gate(found, True, gate, "int8") == [
        "top-1 drop 9.00 points > 1.5 (gates.int8.max_top1_drop)",
        "flips 50.00 % > 8 (gates.int8.max_flips)",
    ]


@pytest.mark.parametrize(("cosine", "wrong"), [(0.9994, False), (0.9956, True)])
def test_a_target_that_loses_far_more_than_its_search_simulated_fails(cosine, wrong):
    """As one whose kernels take another layer's scales: within the loose limits of FP8, and broken."""
    found = measured(parity={tower: replace(parity(), cosine_mean=cosine) for tower in ("vision", "text")})
    search = Search([], 24, 0.0, 0.0, 0.9997, {}, [])
    content = {**checked(precision="fp8", runtime="fused"), **plain(found), "search": plain(search)}
    record = parse(Validation, content, "record")
    failures = [str(failure) for failure in failures_now(record, GatesConfig())]
    assert failures == (
        [
            "mean cosine 0.99560 (the search for its accuracy budget simulated 0.99970: the runtime does not compute "
            "what was quantised)"
        ]
        if wrong
        else []
    )


def test_a_target_that_failed_to_build_fails_and_names_its_reason(check, tmp_path):
    def make(folder):
        raise RuntimeError("Gather_3: out of bounds")

    build(tmp_path / "ort-fp32", make, Target("ort", "fp32"))
    record = check(tmp_path / "ort-fp32")
    assert record.status == "fail"
    assert record.reasons[0].startswith("RuntimeError: Gather_3: out of bounds (its traceback is in the terminal)")


def test_whatever_a_check_raises_fails_its_own_row(onnx_target, sets, monkeypatch, capsys):
    def wrong(*_):
        raise ZeroDivisionError("of a library")

    monkeypatch.setattr(validation, "check_gate", wrong)
    prepared, reference = load_prepared(sets / "evaluation"), sets / "evaluation" / "reference.npz"
    record = validate_apart(onnx_target, prepared, reference, GATES, 0)
    assert record.status == "fail"
    assert record.reasons[0].startswith("ZeroDivisionError: of a library (its traceback is in the terminal)")
    assert "in wrong" in capsys.readouterr().err  # where it was raised, in the other process


@pytest.mark.parametrize("kind", ["hardlink", "symlink"])
def test_weights_beside_a_graph_may_be_links_into_dvcs_cache(sets, onnx_target, tmp_path, monkeypatch, kind, kinds):
    monkeypatch.setattr(onnx_file, "EXTERNAL_BYTES", 1_000_000)
    calibration = load_prepared(sets / "calibration")
    made = {
        "onnx-fp32": lambda folder: copied(onnx_target, folder),
        "ort-fp32": lambda folder: optimize(tmp_path / "onnx-fp32", OptimizeConfig(), calibration, folder),
        "ort-fp16": lambda folder: optimize(
            tmp_path / "onnx-fp32", OptimizeConfig(precision=Precision.fp16), calibration, folder
        ),
        "ort-int8": lambda folder: quantize(tmp_path / "ort-fp32", QuantizeConfig(), calibration, [], 0, folder),
    }
    dvc(tmp_path, "init", "-q", "--no-scm")
    dvc(tmp_path, "config", "cache.type", kind)
    evaluation = sets / "evaluation"
    statuses = {}
    for name, make in made.items():
        build(tmp_path / name, make, Target("ort", "fp32"))
        dvc(tmp_path, "add", "-q", name)
        record = validate(tmp_path / name, load_prepared(evaluation), evaluation / "reference.npz", GATES, 0)
        assert record.status == "pass", (name, record.reasons)
        statuses[name] = record.status
    package = tmp_path / "package"
    package.mkdir()
    known = records(tmp_path, tmp_path / "validate")
    sources = Sources(tmp_path, known, sets / "portable", evaluation)
    write_package(advice(tmp_path), "ort-fp32", sources, GatesConfig(), Run("tiny", 0, {}), package)
    dvc(tmp_path, "add", "-q", "package")
    shown = ZeroShotClassifier.open(package).predict(Image.new("RGB", (48, 48)), ["a red circle", "a blue star"])
    assert sum(probability for _, probability in shown) == pytest.approx(1, abs=1e-5)
    data = tmp_path / "ort-fp32" / "vision.onnx.data"
    assert (data.is_symlink(), data.stat().st_nlink > 1) == {"hardlink": (False, True), "symlink": (True, False)}[kind]
    kinds(
        f"24: weights beside the graph, cache.type {kind}",
        before="optimize: may indicate a hard link attack",
        now=statuses,
    )


def copied(source, folder):
    """The target with its weights beside the graphs."""
    for tower in ("vision", "text"):
        onnx_file.save(ir.load(source / f"{tower}.onnx"), folder / f"{tower}.onnx")
    return replace(read_target(source), files=onnx_file.files_of(folder))


def dvc(folder, *words):
    with contextlib.chdir(folder):
        assert dvc_command(list(words)) == 0


def test_a_folder_that_dvc_links_is_handed_out_as_real_files(tmp_path):
    """As docs/guides/troubleshooting.md says: `dvc unprotect` where it lies, or `cp -rL`."""
    folder = tmp_path / "triton"
    (folder / "onnxruntime").mkdir(parents=True)
    (folder / "onnxruntime" / "model.onnx").write_text("weights")
    dvc(tmp_path, "init", "-q", "--no-scm")
    dvc(tmp_path, "config", "cache.type", "symlink")
    dvc(tmp_path, "add", "-q", "triton")
    assert (folder / "onnxruntime" / "model.onnx").is_symlink()
    subprocess.run(["cp", "-rL", "triton", "copy"], cwd=tmp_path, check=True)
    dvc(tmp_path, "unprotect", "triton")
    shutil.rmtree(tmp_path / ".dvc" / "cache")
    for name in ("copy", "triton"):
        file = tmp_path / name / "onnxruntime" / "model.onnx"
        assert (file.is_symlink(), file.read_text()) == (False, "weights")
