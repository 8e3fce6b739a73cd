"""The same inputs give the same bytes: in another folder, with other hash seeds and temporary folders."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from support.project import ROOT

from benchmarks.reproducible import Copy, Hashes, compare, extended, markdown, summary, unexplained
from clip_deploy.core.artifact import Target, read_target
from clip_deploy.core.files import sha256

BUILD = """
import sys
from pathlib import Path

from support.project import TINY
from support.targets import packed
from clip_deploy.builders.torch_checkpoint import export_torch
from clip_deploy.checkpoint.fetch import fetch
from clip_deploy.checkpoint.load import load_processor
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import *
from clip_deploy.data.dataset import load
from clip_deploy.builders.fused import optimize
from clip_deploy.builders.onnx_export import export_onnx
from clip_deploy.builders.processor_files import write_portable
from clip_deploy.data.preprocessed import load_prepared, write_prepared
from clip_deploy.builders.quantize import quantize
from clip_deploy.serving.repository import write_repository
from clip_deploy.builders.tensorrt import build_engine
from clip_deploy.builders.torchscript import export_torchscript

sets, built = Path(sys.argv[1]), Path("artifacts")
reference, exported, fused = (built / name for name in ("torch-fp32", "onnx-fp32", "ort-fp32"))
calibration, static = load_prepared(sets / "calibration"), Quantization.static
budget = AccuracyBudget(max_flips=5.0)

def make(name, function, runtime="ort", precision="fp32"):
    build(built / name, function, Target(runtime, precision))

make("torch-fp32", lambda folder: fetch(ModelConfig(path=str(TINY)), folder))
make("torch-bf16", lambda folder: export_torch(reference, TorchConfig(precision=Precision.bf16), Device.cpu, folder))
for name in ("bf16", "int8"):
    make(f"torchscript-{name}", lambda folder: export_torchscript(reference, Precision(name), folder))
make("onnx-fp32", lambda folder: export_onnx(reference, OnnxConfig(), folder))
make("old-opset", lambda folder: export_onnx(reference, OnnxConfig(opset=17), folder))
for name in ("fp32", "fp16"):
    settings = OptimizeConfig(precision=Precision(name))
    make(f"ort-{name}", lambda folder: optimize(exported, settings, calibration, folder))
for name, settings in {
    "dynamic": QuantizeConfig(source="ort-fp32", accuracy_budget=budget),
    "static": QuantizeConfig(source="ort-fp32", method=static, smooth_quant=0.5),
    "blocks": QuantizeConfig(source="ort-fp32", method=Quantization.weight_only),
}.items():
    make(f"ort-int8-{name}", lambda folder: quantize(fused, settings, calibration, ["avx512_vnni"], 0, folder))
half = BuildEngineConfig(precision=Precision.fp16)
make("trt-fp16", lambda folder: build_engine(exported, half, calibration, folder))

data = DataConfig(evaluation_samples=48, calibration_samples=16, templates=["a photo of a {}"])
drawn, processor, model = load(data, 0), load_processor(reference), read_target(reference).model
for name in ("evaluation", "calibration"):
    (built / "data" / name).mkdir(parents=True)
    write_prepared(name, drawn, data.templates, processor, model, built / "data" / name, keep_images=True)
(built / "data/portable").mkdir()
write_portable(reference, built / "data/portable")
(built / "package").mkdir()
packed(fused, sets, built / "package")
write_repository(built / "package", built, TritonConfig(), built / "triton")
"""


@pytest.fixture(scope="module")
def twice(sets, tmp_path_factory):
    """The artifacts of two fresh processes, which run at once."""
    (program := tmp_path_factory.mktemp("program") / "build.py").write_text(BUILD)
    folders = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b") / "deeper" / "folder"
    running = []
    for seed, folder in enumerate(folders, 1):
        (folder / "temporary").mkdir(parents=True)
        surroundings = {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "PYTHONHASHSEED": str(seed),
            "TMPDIR": str(folder / "temporary"),
        }
        command = [sys.executable, str(program), str(sets)]
        running.append(subprocess.Popen(command, cwd=folder, env=os.environ | surroundings))
    assert [process.wait() for process in running] == [0, 0]
    return [folder / "artifacts" for folder in folders]


def hashes(folder):
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


def test_two_builds_are_equal_byte_for_byte(twice):
    first, second = map(hashes, twice)
    assert [path for path in first | second if first.get(path) != second.get(path)] == []


def test_every_kind_of_target_was_built(twice):
    built = {folder.parent.name: read_target(folder.parent).files for folder in twice[0].glob("*/target.json")}
    assert len(built) == 12
    assert [name for name, files in built.items() if not files] in ([], ["trt-fp16"])  # where there is no TensorRT-RTX
    assert (twice[0] / "triton" / "onnxruntime" / "clip_vision").is_dir()


def test_no_artifact_names_a_folder_of_this_machine(twice):
    debug = ".debug_pkl"  # TorchScript's records with paths of sources, compressed
    places = [os.fsencode(path) for path in (twice[0].parent, ROOT, sys.prefix, debug)]
    for path in twice[0].rglob("*"):
        assert not path.is_file() or not any(place in path.read_bytes() for place in places), path


FIRST: Hashes = {"a/vision.onnx": "1", "b/vision.pt2": "2", "c/text.onnx": "3"}


def test_the_shipped_settings_are_extended_by_what_is_off_in_them():
    params = extended((ROOT / "params.yaml").read_text())
    assert "\nexport_aoti: {aoti-fp32: {precision: fp32}}" in params
    with pytest.raises(SystemExit, match=r"no `export_torch: \{\}`"):
        extended(params)


def test_what_stands_for_a_target_that_could_not_be_built_is_no_equal_file(tmp_path):
    copy = Copy.__new__(Copy)
    copy.path = tmp_path
    for name, reason in (("openvino-fp32", "openvino is not installed"), ("ort-fp32", None)):
        folder = tmp_path / "artifacts" / name
        folder.mkdir(parents=True)
        (folder / "target.json").write_text(json.dumps(asdict(Target("ort", "fp32", unavailable=reason))))
        folder.with_name(f"{name}.manifest.json").write_text("{}")
    assert list(copy.hashes()) == ["ort-fp32/target.json", "ort-fp32.manifest.json"]
    assert copy.unavailable() == {"openvino-fp32": "openvino is not installed"}


def test_what_differs_is_said_and_only_what_is_explained_is_let_pass():
    second = FIRST | {"b/vision.pt2": "4"}
    assert unexplained(compare(FIRST, second, {"b/vision.pt2": "2"})) == []
    assert unexplained(compare(FIRST, second, {"b/vision.pt2": "5"})) == ["b/vision.pt2 differs"]
    assert unexplained(compare(FIRST, FIRST | {"a/vision.onnx": "9"}, {})) == ["a/vision.onnx differs"]
    assert unexplained(compare(FIRST, {"a/vision.onnx": "1", "b/vision.pt2": "2"}, {})) == ["c/text.onnx differs"]


def test_the_page_shows_both_hashes_of_each_file():
    files = compare(FIRST, FIRST | {"b/vision.pt2": "4"}, {"b/vision.pt2": "2"})
    machine = {"hardware": {"cpu": "EPYC"}, "software": {"torch": "2.13", "openvino": None}}
    page = markdown({"files": files, "unavailable": {"trt-fp32": "no GPU"}, **machine})
    assert summary(files) in page
    assert "2 of 3 model files and 0 of 0 other files are equal, byte for byte; 0 differ unexpectedly" in page
    assert "| `.onnx` | 2 | 2 | - | none |" in page
    assert "| `.pt2` | 1 | 0 | 1 | AOTInductor hands the C++ compiler sources by their full paths" in page
    assert "Not built here, and so not compared and not counted:\n\n- `trt-fp32`: no GPU\n" in page
    assert "| `a/vision.onnx` | `1` | `1` | yes |" in page
    assert "| `b/vision.pt2` | `2` | `4` | in the same folder |" in page
    assert "on EPYC: torch 2.13." in page
