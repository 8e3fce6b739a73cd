"""Each stage as a program of its own: help, overrides, sweeps, errors, and what it imports."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import COMMANDS, ROOT

from clip_deploy.core.artifact import write_manifest
from clip_deploy.core.errors import DeployError
from stages import _check_inputs
from stages.probe import identity

STAGES = sorted({path.stem for path in (ROOT / "stages").glob("[a-z]*.py")} - COMMANDS)
WITHOUT_TORCH = ("probe", "optimize", "quantize", "validate", "benchmark", "recommend", "triton_repository", "report")


def run(*arguments, cwd=ROOT, code=None):
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m"]
    return subprocess.run([*command, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_there_are_twenty_stages():
    assert len(STAGES) == 20


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_explains_itself(name):
    done = run(f"stages.{name}", "--help")
    assert done.returncode == 0, done.stderr
    assert "Settings (key=value overrides them" in done.stdout
    assert "output: ???" in done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_that_is_run_by_hand_explains_itself(name):
    done = run(f"stages.{name}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m stages.{name}" in done.stdout


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_under_fifty_lines(name):
    assert len((ROOT / "stages" / f"{name}.py").read_text().splitlines()) < 50


@pytest.mark.parametrize("read", ["data/portable", "data"])
def test_prepared_data_that_rotted_stop_a_stage_that_reads_them(read, tmp_path):
    """As target's files do, and also where their mtime is that of before, which DVC trusts."""
    folder = tmp_path / "data" / "portable"
    folder.mkdir(parents=True)
    (folder / "preprocessor.json").write_text('{"crop": [48, 48]}')
    write_manifest(folder)
    settings = SimpleNamespace(read=tmp_path / read, output=tmp_path / "out", seed=0)
    _check_inputs(settings)
    (folder / "preprocessor.json").write_text('{"crop": [49, 48]}')
    with pytest.raises(DeployError, match=r"preprocessor.json is not the file that was built .*; `rm -r \S*portable`"):
        _check_inputs(settings)
    (tmp_path / "data" / "portable.manifest.json").write_text("[]")
    with pytest.raises(DeployError, match=r"portable.manifest.json does not say what .* holds .*; run `dvc repro"):
        _check_inputs(settings)


def test_a_local_data_set_is_known_by_all_of_its_files(tmp_path, monkeypatch):
    """A CSV with the images that it names, and a folder for `datasets`: an image that changes changes what it is."""
    (tmp_path / "images").mkdir()
    image, table = tmp_path / "images" / "a.png", tmp_path / "captions.csv"
    image.write_bytes(b"a")
    table.write_text("picture,caption\nimages/a.png,A\nimages/gone.png,B\n")
    (tmp_path / "data").mkdir()
    csv = f"source: captions\npath: {table}\nimage_column: picture\ncaption_column: caption\n"
    (tmp_path / "data" / "csv.yaml").write_text(csv)
    (tmp_path / "data" / "folder.yaml").write_text(f"source: hub\ndataset_id: {tmp_path / 'images'}\n")
    (tmp_path / "data" / "far.yaml").write_text("source: hub\ndataset_id: uoft-cs/cifar10\n")
    monkeypatch.setattr("stages.probe.CONF", tmp_path)
    before = [identity("data", name) for name in ("csv", "folder", "far")]
    image.write_bytes(b"b")
    after = [identity("data", name) for name in ("csv", "folder", "far")]
    assert [was == now for was, now in zip(before, after, strict=True)] == [False, False, True]


def test_a_missing_setting_is_named():
    done = run("stages.validate", "output=x.json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: settings: source: ")


def test_an_unknown_setting_is_named():
    done = run("stages.validate", "outptu=x.json")
    assert done.returncode == 1
    assert "outptu" in done.stderr


def test_an_unknown_choice_is_named_with_the_known_ones():
    done = run("stages.benchmark", "benchmark=slow")
    assert done.returncode == 1
    assert "benchmark/slow" in done.stderr
    assert "thorough" in done.stderr


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("export_torchscript", ["source"]),
        ("optimize", ["source", "calibration"]),
        ("build_engine", ["source", "calibration"]),
    ],
)
def test_an_unknown_target_is_named_with_the_known_ones(name, read):
    done = run(f"stages.{name}", "target=nope", "output=o", *(f"{path}=x" for path in read))
    assert done.returncode == 1
    assert f"error: target is 'nope': {name} in params.yaml has " in done.stderr


def test_a_wrong_type_is_named():
    done = run("stages.benchmark", "benchmark.threads=many")
    assert done.returncode == 1
    assert "benchmark.threads" in done.stderr


def test_a_check_across_settings_speaks_before_work():
    done = run("stages.export_onnx", "onnx.opset=99", "source=nowhere", "output=x")
    assert done.returncode == 1
    assert done.stderr.startswith("error: settings: onnx.opset is 99 with onnx.exporter auto")


def test_a_sweep_runs_the_stage_for_each_value(checkpoint, onnx_target, tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for name in ("stages", "clip_deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = run(
        "stages.benchmark",
        f"source={onnx_target}",
        f"reference={checkpoint}",
        "output=result-${benchmark.threads}.json",
        "benchmark=quick",
        "benchmark.batch_sizes=[1]",
        "-m",
        "benchmark.threads=1,2",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / f"result-{n}.json").read_text())["threads"] for n in (1, 2)] == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} - {"multirun.yaml"} == {
        "conf",
        "params.yaml",
        "stages",
        "clip_deploy",
        "result-1.json",
        "result-2.json",
    }


IMPORTS = """
import runpy, sys
name, arguments = sys.argv[1], sys.argv[2:]
sys.argv = [name, *arguments]
try:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
finally:
    heavy = sorted({"torch", "transformers"} & set(sys.modules))
    print("HEAVY", heavy)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_a_stage_that_does_not_need_torch_does_not_import_it(built, tmp_path, name):
    project = built.copy(tmp_path / "project")
    arguments = {
        "probe": ["output=out/environment.json", "inputs=out/inputs.json"],
        "optimize": [
            "target=ort-fp32",
            "source=artifacts/onnx-fp32",
            "calibration=artifacts/data/calibration",
            "output=out/ort",
        ],
        "quantize": [
            "target=ort-int8-static",
            "source=artifacts/onnx-fp32",
            "calibration=artifacts/data/calibration",
            "environment=reports/environment.json",
            "output=out/int8",
        ],
        "validate": [
            "source=artifacts/ort-fp32",
            "evaluation=artifacts/data/evaluation",
            "model_name=a",
            "environment=reports/environment.json",
            "output=out/v.json",
            "manifest=out/ort-fp32.manifest.json",
        ],
        "benchmark": ["source=artifacts/ort-fp32", "reference=artifacts/torch-fp32", "output=out/b.json"],
        "recommend": [
            "validation=reports/validate",
            "benchmark_results=reports/benchmark",
            "built=artifacts",
            "evaluation=artifacts/data/evaluation",
            "portable=artifacts/data/portable",
            "output=out/r.json",
        ],
        "triton_repository": [
            "package=artifacts/package",
            "benchmark_results=reports/benchmark",
            "output=out/triton",
        ],
        "report": [
            "model_name=a",
            "data_name=b",
            "environment=reports/environment.json",
            "checkpoint=artifacts/torch-fp32",
            "evaluation=artifacts/data/evaluation",
            "validation=reports/validate",
            "benchmark_results=reports/benchmark",
            "recommendation=reports/recommendation.json",
            "served=reports/triton.json",
            "output=out",
        ],
    }[name]
    done = run(f"stages.{name}", *arguments, cwd=project.path, code=IMPORTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "HEAVY []"
