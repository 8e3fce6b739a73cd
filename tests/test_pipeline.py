"""The real dvc in a temporary copy: what runs after which change, and that nothing is lost."""

import contextlib
import json
import os
import re
import shutil
import sys
from importlib.util import find_spec

import pytest
import yaml
from dvc.repo import Repo
from support.project import Project

from clip_deploy.core.manifest import TargetManifest, find_manifest, verify
from clip_deploy.core.parsing import read_record
from clip_deploy.data import scenes

pytestmark = pytest.mark.slow

TARGETS = [
    "torch-fp32",
    "torch-int8",
    "torchscript-fp32",
    "openvino-fp32",
    "onnx-fp32",
    "ort-fp32",
    "ort-fp16",
    "ort-int8-dynamic",
    "ort-int8-static",
]
ONNX = TARGETS[4:]
OPENVINO = TARGETS[3:4]
MISSING = [] if find_spec("openvino") and find_spec("nncf") else OPENVINO  # their rows are unavailable
BUILDS = {
    "onnx-fp32": "export_onnx",
    "ort-fp32": "optimize@ort-fp32",
    "ort-fp16": "optimize@ort-fp16",
    "ort-int8-dynamic": "quantize@ort-int8-dynamic",
    "ort-int8-static": "quantize@ort-int8-static",
    "torch-int8": "export_torchscript@torch-int8",
    "torchscript-fp32": "export_torchscript@torchscript-fp32",
    "openvino-fp32": "export_openvino@openvino-fp32",
}
CONVERTED = {BUILDS[target] for target in OPENVINO}
FUSED = {BUILDS[target] for target in ("ort-fp32", "ort-fp16")}
INT8 = {BUILDS[target] for target in ("ort-int8-dynamic", "ort-int8-static")}
SERVED = {"validate_serving", "validate_triton"}
SHIPPED = {"package", "triton_repository", *SERVED}  # where timing decides for another target or batch size
REPORTED = {"recommend", "report"}


def measured(targets):
    return {f"{stage}@{target}" for target in targets for stage in ("validate", "benchmark")}


@pytest.fixture
def copy(built, tmp_path):
    return built.copy(tmp_path / "project")


def keep(project, targets):
    """Take all other targets out of params.yaml."""
    path = project.path / "params.yaml"
    params = yaml.safe_load(path.read_text())
    left_out = set(params["targets"]) - set(targets)
    params["targets"] = targets
    for section in params.values():
        for name in left_out & set(section if isinstance(section, dict) else ()):
            del section[name]
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def due(project):
    """The stages whose settings, code or inputs are not those of their last run; what hangs on them comes later."""
    with contextlib.chdir(project.path), Repo() as repo:  # `dvc status`, without its imports
        return set(repo.status()) - {"probe"}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def metrics(project):
    return json.loads((project.path / "reports/targets.json").read_text())


def environment(project):
    return json.loads((project.path / "reports/environment.json").read_text())


def hardware(project):
    return environment(project)["hardware"]


def timed(project, target):
    """The image tower's timing, which targets.json may withhold where the tests keep the machine busy."""
    return json.loads((project.path / f"reports/benchmark/{target}.json").read_text())["towers"]["vision"]["1"]


def manifest(project):
    return json.loads((project.path / "artifacts/package/manifest.json").read_text())


def test_what_is_recommended_is_packaged_as_it_was_judged_and_answers(built, tmp_path):
    advice = json.loads((built.path / "reports/recommendation.json").read_text())
    for tower, chosen in manifest(built)["towers"].items():
        assert chosen["sha256"] == advice["targets"][chosen["target"]]["files"][f"{tower}.onnx"]
        assert chosen["target"] in ONNX
    scene, _ = scenes.render("pipeline", 0, 0)
    scene.save(tmp_path / "scene.png")
    done = built.run(sys.executable, "-m", "clip_deploy", "predict", str(tmp_path / "scene.png"), "--top", "1")
    assert done.stdout.endswith("  red circle\n")


def test_without_a_triton_server_its_repository_is_made_and_its_check_unavailable(built):
    assert (built.path / "artifacts/triton/onnxruntime/clip_zero_shot/config.pbtxt").is_file()
    record = json.loads((built.path / "reports/triton.json").read_text())
    assert record["status"] == "unavailable"
    assert "make triton-env" in (built.path / "reports/report.md").read_text()


def test_every_target_is_built_checked_and_timed(built):
    record = metrics(built)
    assert list(record) == TARGETS
    for target, row in record.items():
        if target in MISSING:
            assert row["status"] == "unavailable"
            continue
        assert row["status"] == "pass", (target, (built.path / "reports/report.md").read_text())
        assert timed(built, target)["p50_ms"] > 0
        assert row["cosine_min"] > 0.9


def test_what_was_built_is_what_its_manifests_say(built):
    for name in [*TARGETS, "package", "triton"]:
        manifest, differences = verify(built.path / "artifacts" / name)
        assert differences == [], name
        if name in TARGETS:
            assert manifest.gates[name] == metrics(built)[name]["status"]
            whole = read_record(TargetManifest, find_manifest(built.path / "artifacts" / name))
            assert (whole.origin.checkpoint is None) == (name in MISSING)


def test_nothing_changed_runs_nothing_but_probe(copy):
    assert copy.repro() == set()
    assert copy.run("git", "status", "--porcelain").stdout == ""


def test_another_opset_rebuilds_only_what_is_exported_to_onnx(copy):
    copy.edit("params.yaml", "opset: 18", "opset: 20")
    assert due(copy) == {"export_onnx"}
    ran = ["onnx-fp32", "ort-fp32"]
    assert copy.repro("optimize@ort-fp32") == {BUILDS[target] for target in ran}
    behind = {BUILDS[target] for target in ("openvino-fp32", "ort-fp16", "ort-int8-dynamic", "ort-int8-static")}
    assert due(copy) == behind | measured(ran)
    copy.run("dvc", "repro", "-s", "validate@ort-fp32", "report")
    assert "ai.onnx 20" in (copy.path / "reports/report.md").read_text()
    assert "onnx.opset" in copy.run("dvc", "params", "diff").stdout
    assert "cosine_min" in copy.run("dvc", "metrics", "diff", "--all").stdout  # a busy machine times nothing


def test_one_quantize_setting_rebuilds_that_target_alone(copy):
    copy.edit("params.yaml", "method: dynamic\n", "method: dynamic\n    per_channel: false\n")
    target = "ort-int8-dynamic"
    assert due(copy) == {BUILDS[target]}
    assert copy.repro(BUILDS[target]) == {BUILDS[target]}
    assert due(copy) == measured([target])


def test_another_accuracy_budget_rebuilds_only_the_int8_targets(copy):
    copy.edit("params.yaml", "max_flips: 2.0", "max_flips: 3.0")
    assert due(copy) == INT8
    assert copy.repro("validate@ort-int8-static") == {BUILDS["ort-int8-static"], "validate@ort-int8-static"}
    assert due(copy) - SHIPPED - REPORTED == {BUILDS["ort-int8-dynamic"], "benchmark@ort-int8-static"}
    build = json.loads((copy.path / "artifacts/ort-int8-static.manifest.json").read_text())["builds"]["ort-int8-static"]
    assert build["accuracy_budget"] == {"max_top1_drop": 1.0, "max_flips": 3.0}


def test_a_gpus_rows_stay_without_one(copy):
    copy.run(sys.executable, "-m", "clip_deploy", "device", "cuda", "--discard")
    some = ["torch-fp32", "torch-fused-fp16", "aoti-fp16", "onnx-fp32", "ort-cuda-fp16", "trt-fp16"]
    keep(copy, some)
    copy.edit("params.yaml", "benchmark: gpu", "benchmark: quick")
    copy.edit("params.yaml", "  targets:\n  - torch-fused-fp16\n", "  targets:\n")
    copy.repro()
    assert list(metrics(copy)) == some
    if shutil.which("nvidia-smi"):
        return
    assert metrics(copy) == {target: {"status": "unavailable"} for target in some}
    assert [path.name for path in (copy.path / "artifacts/package").iterdir()] == ["manifest.json"]
    assert "no target passes its gate" in manifest(copy)["unavailable"]
    page = (copy.path / "reports/report.md").read_text()
    for target in ("torch-fused-fp16", "aoti-fp16"):
        assert re.search(f"^- .*`{target}`.* unavailable: no CUDA device that PyTorch can use", page, re.MULTILINE)
    assert re.search("^- .*`ort-cuda-fp16` unavailable: no CUDA device: NVIDIA's driver is not", page, re.MULTILINE)


def test_a_new_target_builds_that_target_alone(copy):
    line = "  ort-fp16: {source: onnx-fp32, precision: fp16}"
    copy.edit("params.yaml", line, f"{line}\n  ort-fp16-again: {{source: onnx-fp32, precision: fp16}}")
    copy.edit("params.yaml", "\n- ort-fp16\n", "\n- ort-fp16\n- ort-fp16-again\n")
    assert copy.repro() - SHIPPED == {"optimize@ort-fp16-again", *measured(["ort-fp16-again"]), *REPORTED}
    assert "ort-fp16-again" in metrics(copy)


def test_a_removed_target_leaves_the_table_and_runs_only_the_report(copy):
    copy.edit("params.yaml", "\n- ort-fp16\n", "\n")
    assert copy.repro() - SHIPPED == REPORTED
    assert "ort-fp16" not in metrics(copy)
    assert "ort-fp16`" not in (copy.path / "reports/report.md").read_text()


def test_another_model_rebuilds_everything(copy, tmp_path):
    copy.edit("conf/model/local.yaml", "path:  #", "path: other  #")
    (copy.path / "other").mkdir()
    for path in (copy.path / "assets/tiny-shapes").iterdir():
        (copy.path / "other" / path.name).write_bytes(path.read_bytes())
    import numpy as np
    from safetensors.numpy import load_file, save_file

    weights = load_file(copy.path / "other/model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"] * np.float32(1.0001)
    save_file(weights, copy.path / "other/model.safetensors", metadata={"format": "pt"})
    copy.edit("params.yaml", "model: tiny-shapes", "model: local")
    before = ["download", "prepare", BUILDS["onnx-fp32"], BUILDS["ort-fp32"]]
    assert copy.repro("optimize@ort-fp32") == set(before)
    after = {"vectors", *BUILDS.values(), *measured(TARGETS), *REPORTED, *SHIPPED} - set(before)
    assert due(copy) == after - {"triton_repository"}  # which waits for the package
    assert copy.repro("-s", "validate@ort-fp32") == {"validate@ort-fp32"}
    assert json.loads((copy.path / "reports/validate/ort-fp32.json").read_text())["status"] == "pass"


def test_a_comment_in_a_yaml_file_runs_nothing(copy):
    for name in ("params.yaml", "conf/model/tiny-shapes.yaml", "conf/benchmark/quick.yaml", "conf/gates/standard.yaml"):
        with (copy.path / name).open("a") as file:
            file.write("\n# a comment\n")
    assert copy.repro() == set()


def test_other_gates_judge_again_and_rebuild_nothing(copy):
    copy.edit("conf/gates/standard.yaml", "fp16: {min_cosine: 0.999,", "fp16: {min_cosine: 1.0,")
    assert due(copy) == {*(f"validate@{target}" for target in TARGETS), "recommend", "package"}
    copy.run("dvc", "repro", "-s", "validate@ort-fp16", "recommend", "report")
    row = metrics(copy)["ort-fp16"]
    assert row["status"] == "fail"
    assert timed(copy, "ort-fp16")["p50_ms"] > 0
    assert re.search(r"`ort-fp16` fail: .*cosine .* < 1\.0", (copy.path / "reports/report.md").read_text())


def stale(project):
    """The stages that the present machine and libraries would run again by themselves."""
    project.run("dvc", "repro", "probe")
    return due(project)


MACHINE = {*measured(TARGETS), *REPORTED, "package", *SERVED}  # what holds or shows measurements


@pytest.mark.parametrize(
    ("library", "builds"),
    [
        ("onnxruntime_gpu", CONVERTED | FUSED | INT8),  # and no export
        ("onnxscript", {BUILDS["onnx-fp32"]} | CONVERTED | FUSED),
        ("torch", {"download", "prepare", *(BUILDS[target] for target in ("onnx-fp32", *TARGETS[1:3]))}),
    ],
)
def test_an_upgrade_builds_what_that_library_builds_and_measures_all(copy, library, builds):
    metadata = copy.path / f"{library}-99.0.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: 99.0\n")
    assert stale(copy) == builds | MACHINE
    assert environment(copy)["software"][library.removesuffix("_gpu")] == "99.0"


def another_cpu(folder, flags, monkeypatch):
    """Every Python of the pipeline reads another /proc/cpuinfo, by a sitecustomize of its own."""
    lines = f"model name\t: Another CPU\nflags\t\t: {' '.join(flags)}\n"
    (folder / "sitecustomize.py").write_text(
        "from pathlib import Path\n"
        "read = Path.read_text\n"
        f"Path.read_text = lambda path, *given, **named: {lines!r} if str(path) == '/proc/cpuinfo' "
        "else read(path, *given, **named)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_another_cpu_and_gpu_measure_again_and_build_nothing(copy, tmp_path, monkeypatch):
    another_cpu(tmp_path, hardware(copy)["instruction_sets"], monkeypatch)
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA Another, 1000 MiB, 600.0'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert stale(copy) == MACHINE
    assert hardware(copy)["cpu"] == "Another CPU"
    assert hardware(copy)["gpus"] == ["NVIDIA Another, 1000 MiB, 600.0"]


def test_another_machine_of_the_same_type_measures_again_and_builds_nothing(copy, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import clip_deploy.core.environment as environment\nenvironment.machine = lambda: 'another'\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{copy.path}")
    assert stale(copy) == MACHINE
    assert hardware(copy)["machine"] == "another"


def test_what_one_machine_built_comes_to_another_by_pull_and_only_timings_are_made_again(copy, tmp_path, monkeypatch):
    copy.run("dvc", "remote", "add", "-d", "store", str(tmp_path / "store"))
    copy.run("git", "commit", "-q", "-a", "-m", "Add a remote")
    copy.run("dvc", "push")
    copy.run("git", "clone", "-q", str(copy.path), str(tmp_path / "clone"))
    there = Project(tmp_path / "clone")
    there.run("dvc", "pull")
    (tmp_path / "sitecustomize.py").write_text(
        "import clip_deploy.core.environment as environment\nenvironment.machine = lambda: 'another'\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{there.path}")
    assert stale(there) == MACHINE
    assert there.repro("benchmark@ort-fp32") == {"benchmark@ort-fp32"}
    other = Project(tmp_path / "other")  # which only takes what was built there
    other.path.mkdir()
    for words in (("git", "init", "-q"), ("dvc", "init", "-q")):
        other.run(*words)
    for command, target in (("get", "ort-fp32"), ("import", "ort-fp16")):
        other.run("dvc", command, str(there.path), f"artifacts/{target}")
        assert files(other.path / target) == files(there.path / "artifacts" / target)


def test_two_branches_that_changed_different_targets_are_merged_and_keep_what_both_measured(copy):
    changes = {
        "dynamic": ("method: dynamic\n", "method: dynamic\n    per_channel: false\n"),
        "static": ("calibration: minmax", "calibration: percentile"),
    }
    for name, (old, new) in changes.items():
        copy.run("git", "checkout", "-q", "-b", name, "main")
        copy.run("dvc", "checkout", "-q")
        copy.edit("params.yaml", old, new)
        assert {f"quantize@ort-int8-{name}", f"benchmark@ort-int8-{name}"} <= copy.repro()
        copy.run("git", "commit", "-q", "-a", "-m", name)
    said = copy.run(sys.executable, "-m", "clip_deploy", "merge", "dynamic").stdout
    assert said.startswith("merged dynamic: ")
    assert copy.run("git", "status", "--porcelain", "-uno").stdout == ""
    assert not copy.repro() & {*BUILDS.values(), *measured(TARGETS)}
    for name in changes:
        path = f"reports/benchmark/ort-int8-{name}.json"
        assert copy.run("git", "diff", name, "--", path).stdout == ""


def test_other_instruction_sets_build_int8_again_which_is_rounded_for_them(copy, tmp_path, monkeypatch):
    another_cpu(tmp_path, ["avx_vnni"], monkeypatch)
    assert hardware(copy)["instruction_sets"] != ["avx_vnni"]
    assert stale(copy) == CONVERTED | INT8 | MACHINE


def test_an_experiment_gives_what_an_edit_gives_and_keeps_hand_edits(copy):
    old = (copy.path / "params.yaml").read_text()
    target, setting = BUILDS["ort-int8-dynamic"], "quantize.ort-int8-dynamic.accuracy_budget.max_flips=3.0"
    copy.edit("params.yaml", "model: tiny-shapes", "model: tiny-shapes  # a remark of mine,")
    copy.run("dvc", "exp", "run", "-S", setting, "-S", "benchmark=quick", target)
    text = (copy.path / "params.yaml").read_text()
    assert "# a remark of mine," in text
    assert yaml.safe_load(text)["quantize"]["ort-int8-dynamic"]["accuracy_budget"]["max_flips"] == 3.0
    experiment = copy.lock()[target]
    (name,) = copy.run("dvc", "exp", "list", "--name-only").stdout.split()
    table = copy.run(sys.executable, "-m", "clip_deploy", "compare", "HEAD", name).stdout
    assert f"- **B**: {name}: " in table
    assert f"| `{TARGETS[0]}` | pass / pass |" in table
    (copy.path / "params.yaml").write_text(old.replace("max_flips: 2.0", "max_flips: 3.0"))
    copy.run("dvc", "repro", "-s", "-f", "--no-run-cache", target)
    assert copy.lock()[target] == experiment


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: tiny-shapes", "model: tiny-shape", "model is 'tiny-shape': accepted are"),
        ("\n- ort-fp16\n", "\n- ort-fp12\n", "targets lists 'ort-fp12', which nothing builds"),
        ("precision: fp16}", "precision: fp12}", "optimize.ort-fp16.precision"),
        ("  opset: 18", "  opset: 99", "onnx.opset is 99"),
        ("seed: 0", "sede: 0", "unknown key sede; accepted are"),
    ],
)
def test_bad_params_stop_before_any_stage_works(copy, old, new, message):
    copy.edit("params.yaml", old, new)
    done = copy.run("dvc", "repro", check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Running stage 'probe'" in done.stdout
    assert done.stdout.count("Running stage") == 1
    assert (copy.path / "artifacts/ort-fp16/vision.onnx").is_file()


def test_a_folder_that_cannot_be_written_loses_nothing(copy):
    """A file stands where artifacts/ should be: one message, and after it is gone the next run goes on."""
    (copy.path / "artifacts").rename(copy.path / "aside")
    (copy.path / "artifacts").write_text("in the way")
    done = copy.run("dvc", "repro", check=False)
    assert done.returncode != 0
    assert "artifacts" in done.stderr
    (copy.path / "artifacts").unlink()
    (copy.path / "aside").rename(copy.path / "artifacts")
    assert copy.repro() == set()


def test_a_checkpoint_that_is_gone_is_refused_and_all_that_was_built_stays(copy):
    copy.edit("conf/model/local.yaml", "path:  #", "path: gone  #")
    copy.edit("params.yaml", "model: tiny-shapes", "model: local")
    done = copy.run("dvc", "repro", check=False)
    assert done.returncode != 0
    assert "error: model.path is gone: no such file or folder; set it in conf/model/local.yaml" in done.stderr
    assert (copy.path / "reports/report.md").is_file()
    assert (copy.path / "artifacts/torch-fp32/model.safetensors").is_file()
    copy.edit("params.yaml", "model: local", "model: tiny-shapes")
    assert copy.repro() == set()
