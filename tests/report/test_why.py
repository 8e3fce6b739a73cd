import shutil

import pytest

from clip_deploy.__main__ import main
from clip_deploy.core.errors import ConfigError
from clip_deploy.report.why import Stage, behind, causes, explain


def pipeline():
    """Two targets, one built from the other; `probe` before all."""

    def stage(*before, out):
        return Stage(before={"probe", *before}, outs=[out])

    return {
        "probe": Stage(before=set(), outs=["reports/environment.json"]),
        "export": stage(out="artifacts/onnx"),
        "optimize@fast": stage("export", out="artifacts/fast"),
        "validate@onnx": stage("export", out="reports/validate/onnx.json"),
        "validate@fast": stage("optimize@fast", out="reports/validate/fast.json"),
        "benchmark@onnx": stage("export", out="reports/benchmark/onnx.json"),
        "benchmark@fast": stage("optimize@fast", out="reports/benchmark/fast.json"),
        "report": stage("validate@onnx", "validate@fast", "benchmark@onnx", "benchmark@fast", out="reports/report.md"),
    }


@pytest.fixture
def stages():
    return pipeline()


def settings(stage, old, new, file="params.yaml"):
    stage.old, stage.new = {file: old}, {file: new}


def test_a_setting_is_followed_to_everything_behind_it(stages):
    settings(stages["export"], {"onnx": {"opset": 18, "exporter": "auto"}}, {"onnx": {"opset": 20, "exporter": "auto"}})
    assert explain(stages) == (
        "onnx.opset: 18 -> 20  (params.yaml)\n"
        "  export -> onnx\n"
        "    optimize@fast -> fast\n"
        "  validate, benchmark: onnx, fast\n"
        "  report"
    )


def test_a_target_leaves_out_its_siblings_and_what_does_not_concern_it(stages):
    settings(stages["export"], {"opset": 18}, {"opset": 20})
    stages["validate@onnx"].files = {"gates.py": "modified"}
    assert explain(stages, "fast") == (
        "opset: 18 -> 20  (params.yaml)\n  export -> onnx\n    optimize@fast -> fast\n  validate, benchmark: fast"
    )


def test_nothing_changed_says_so(stages):
    assert explain(stages) == "nothing changed: only probe runs, as it always does"
    settings(stages["optimize@fast"], {"precision": "fp32"}, {"precision": "fp16"})
    assert explain(stages, "onnx") == "nothing changed for onnx: only probe runs, as it always does"


def test_an_unknown_target_is_named_with_the_known_ones(stages):
    with pytest.raises(ConfigError, match="target is 'slow': accepted are onnx, fast, and stages: probe, export"):
        explain(stages, "slow")


def test_causes_of_the_same_stages_share_a_tree(stages):
    for name in ("benchmark@onnx", "benchmark@fast"):
        old, new = {"hardware": {"cpu": "EPYC", "gpus": []}}, {"hardware": {"cpu": "Xeon", "gpus": ["H100"]}}
        settings(stages[name], old, new, "environment.json")
    assert explain(stages) == (
        "hardware.cpu: EPYC -> Xeon  (environment.json)\n"
        "hardware.gpus: +H100  (environment.json)\n"
        "  benchmark: onnx, fast\n"
        "  report"
    )


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ({"seed": 0}, {"seed": 1}, "seed: 0 -> 1  (params.yaml)"),
        ({"limit": None}, {"limit": 1.5}, "limit: none -> 1.5  (params.yaml)"),
        ({}, {"fold": True}, "fold: none -> true  (params.yaml)"),
        ({"targets": ["a", "b"]}, {"targets": ["a", "c"]}, "targets: +c, -b  (params.yaml)"),
        ({"targets": ["a", "b"]}, {"targets": ["b", "a"]}, "targets: another order  (params.yaml)"),
    ],
)
def test_a_change_is_said_in_one_line(stages, old, new, line):
    settings(stages["export"], old, new)
    assert causes(stages) == {line: {"export"}}


def test_a_file_of_settings_that_was_not_read_before_is_one_cause(stages):
    stages["export"].old, stages["export"].new = {"conf/a.yaml": {"x": 1}}, {"conf/b.yaml": {"x": 1, "y": 2}}
    assert causes(stages) == {"conf/b.yaml: read now": {"export"}}


def test_a_changed_model_is_no_cause_where_the_stage_that_writes_it_runs(stages):
    stages["export"].files = {"export.py": "modified"}
    stages["optimize@fast"].files = {"artifacts/onnx": "modified"}
    assert causes(stages) == {"export.py: modified": {"export"}}


def test_a_setting_that_another_stage_writes_is_no_cause_where_that_one_runs(stages):
    settings(stages["report"], {"best": "onnx"}, {"best": "fast"}, "reports/validate/fast.json")
    assert causes(stages) == {"best: onnx -> fast  (reports/validate/fast.json)": {"report"}}
    stages["validate@fast"].files = {"validate.py": "modified"}
    assert causes(stages) == {"validate.py: modified": {"validate@fast"}}


def test_a_model_that_changed_by_itself_is_a_cause(stages):
    stages["optimize@fast"].files = {"artifacts/onnx": "modified"}
    assert causes(stages) == {"artifacts/onnx: modified": {"optimize@fast"}}


def test_a_folder_of_results_is_no_cause_where_one_of_them_is_made_anew(stages):
    stages["validate@fast"].files = {"validate.py": "modified"}
    stages["report"].files = {"reports/validate": "modified"}
    assert causes(stages) == {"validate.py: modified": {"validate@fast"}}


def test_what_the_cache_gives_back_runs_nothing_behind_it(stages):
    stages["export"].files, stages["export"].is_cached = {"artifacts/onnx": "deleted"}, True
    for name in ("optimize@fast", "validate@onnx", "benchmark@onnx"):
        stages[name].files = {"artifacts/onnx": "deleted"}
    assert explain(stages) == "artifacts/onnx: deleted, and taken back from DVC's cache\n  export -> onnx"


def test_all_that_a_new_clone_lacks_is_one_cause(stages):
    for name, lost in (("export", ["onnx", "onnx.manifest.json"]), ("optimize@fast", ["fast"])):
        stages[name].files = dict.fromkeys([f"artifacts/{out}" for out in lost], "not in cache")
    stages["validate@fast"].files = {"gates.py": "modified"}
    assert explain(stages) == (
        "not in DVC's cache (`dvc pull` fetches what a remote has): artifacts/onnx, artifacts/fast\n"
        "  export -> onnx\n"
        "    optimize@fast -> fast\n"
        "  validate, benchmark: onnx, fast\n"
        "  report\n\n"
        "gates.py: modified\n"
        "  validate: fast\n"
        "  report"
    )
    stages["export"].files.pop("artifacts/onnx.manifest.json")
    assert explain(stages, "onnx") == "artifacts/onnx: not in cache\n  export -> onnx\n  validate, benchmark: onnx"


def test_a_stage_without_a_record_never_ran(stages):
    stages["optimize@fast"].is_new = True
    assert causes(stages) == {"not in dvc.lock: never run": {"optimize@fast"}}


def test_after_a_run_only_what_ran_is_shown(stages):
    settings(stages["export"], {"opset": 18}, {"opset": 20})
    for name, stage in stages.items():
        stage.has_run = name in ("export", "validate@onnx")
    assert behind(stages, {"export"}) == {"export", "validate@onnx"}


@pytest.fixture
def copy(built, tmp_path, monkeypatch):
    project = built.copy(tmp_path / "project")
    monkeypatch.chdir(project.path)
    return project


def why(capsys, *arguments):
    code = main(["why", *arguments])
    said = capsys.readouterr()
    return (said.out if code == 0 else said.err).rstrip("\n")


REST = "  recommend, package, triton_repository, validate_triton, validate_serving, report"


@pytest.mark.slow
def test_before_a_run_a_setting_is_followed_through_the_real_pipeline(copy, capsys):
    assert why(capsys) == "nothing changed: only probe runs, as it always does"
    copy.edit("params.yaml", "opset: 18", "opset: 20")
    assert why(capsys, "ort-int8-static") == (
        "onnx.opset: 18 -> 20  (params.yaml)\n"
        "  export_onnx -> onnx-fp32\n"
        "    optimize@ort-fp32 -> ort-fp32\n"
        "      quantize@ort-int8-static -> ort-int8-static\n"
        "  validate, benchmark: ort-int8-static"
    )
    assert why(capsys, "torch-int8").startswith("nothing changed for torch-int8")
    copy.edit("params.yaml", "opset: 20", "opset: 99")
    assert why(capsys).startswith("error: params.yaml: onnx.opset is 99")


@pytest.mark.slow
def test_each_kind_of_change_is_named_with_its_stages(copy, capsys):
    """All at once: each of them alone gives the same tree."""
    copy.edit("params.yaml", "method: dynamic\n", "method: dynamic\n    per_channel: false\n")
    with (copy.path / "stages/export_torchscript.py").open("a") as file:
        file.write("# touched\n")
    metadata = copy.path / "onnxruntime_gpu-99.0.dist-info/METADATA"  # found before the installed one, by probe
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 99.0\n")
    shutil.rmtree(copy.path / "artifacts/torch-int8")
    said = why(capsys)
    trees = dict(tree.split("\n", 1) for tree in said.split("\n\n"))
    upgrade = next(line for line in trees if line.startswith("software.onnxruntime: "))
    assert upgrade.endswith(" -> 99.0  (reports/environment.json)")
    assert "optimize@ort-fp16 -> ort-fp16" in trees[upgrade]
    assert "export_onnx" not in trees[upgrade]
    assert "validate, benchmark: torch-fp32, torch-int8," in trees[upgrade]
    setting = "quantize.ort-int8-dynamic.per_channel: none -> false  (params.yaml)"
    assert trees[setting] == (
        "  quantize@ort-int8-dynamic -> ort-int8-dynamic\n  validate, benchmark: ort-int8-dynamic\n" + REST
    )
    code = trees["stages/export_torchscript.py: modified"]
    assert "export_torchscript@torchscript-fp32 -> torchscript-fp32" in code
    assert trees["artifacts/torch-int8: deleted"].startswith("  export_torchscript@torch-int8 -> torch-int8\n")


@pytest.mark.slow
def test_after_a_run_the_two_locks_say_why_it_ran(copy, capsys):
    assert why(capsys, "--since", "HEAD").startswith("nothing changed")
    copy.edit("params.yaml", "max_memory_mb:\n", "max_memory_mb: 1000\n")
    assert copy.repro("--single-item", "recommend") == {"recommend"}
    assert why(capsys, "--since", "HEAD") == "recommend.max_memory_mb: none -> 1000  (params.yaml)\n  recommend"
    assert why(capsys, "--since", "nowhere").startswith("error: git knows no revision 'nowhere' here")
