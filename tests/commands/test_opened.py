import json

import pytest
from support.project import ROOT

from clip_deploy.__main__ import main
from clip_deploy.commands.opened import warn_if_outdated

# As DVC writes it, of four stages in a row and one behind the package.
LOCK = """\
schema: '2.0'
stages:
  download:
    cmd: python -m stages.download
    outs:
    - path: artifacts/torch-fp32
      hash: md5
      md5: 1a.dir
  validate@torch-fp32:
    cmd: python -m stages.validate source=artifacts/torch-fp32 
      output=reports/validate/torch-fp32.json
    deps:
    - path: artifacts/torch-fp32
      hash: md5
      md5: 1a.dir
    - path: clip_deploy/core
      hash: md5
      md5: 2a.dir
    params:
      params.yaml:
        device: cpu
    outs:
    - path: reports/validate/torch-fp32.json
      hash: md5
      md5: 3a
  recommend:
    cmd: python -m stages.recommend
    deps:
    - path: reports/validate
      hash: md5
      md5: 3b.dir
    outs:
    - path: reports/shipped.json
      hash: md5
      md5: 4a
  package:
    cmd: python -m stages.package
    deps:
    - path: clip_deploy/core
      hash: md5
      md5: 2b.dir
    - path: reports/shipped.json
      hash: md5
      md5: 4a
    outs:
    - path: artifacts/package
      hash: md5
      md5: 5a.dir
  triton_repository:
    cmd: python -m stages.triton_repository
    deps:
    - path: artifacts/package
      hash: md5
      md5: 5b.dir
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose package is that of its last run, which went through."""
    (tmp_path / "artifacts/package").mkdir(parents=True)
    (tmp_path / "artifacts/package/manifest.json").write_text(json.dumps({"model": "tiny-shapes"}))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (tmp_path / "dvc.lock").write_text(LOCK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(folder, capsys):
    warn_if_outdated(folder)
    return capsys.readouterr().err


def edited(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_package_of_the_last_run_gets_no_warning(project, capsys):
    assert said(project / "artifacts/package", capsys) == ""


def test_a_package_of_another_model_than_params_name_gets_one(project, capsys):
    edited(project / "params.yaml", "model: tiny-shapes", "model: local")
    assert said(project / "artifacts/package", capsys) == (
        f"warning: {project}/artifacts/package is out of date: it holds the model tiny-shapes, and params.yaml names "
        "local; run `dvc repro`, or wait for it\n"
    )


@pytest.mark.parametrize(("made", "waiting"), [("md5: 4a", "package"), ("md5: 1a.dir", "validate@torch-fp32")])
def test_a_run_that_goes_on_is_seen_by_what_its_stages_have_not_read_yet(project, made, waiting, capsys):
    """The stage that has ended made another file; those behind it have read the former one."""
    edited(project / "dvc.lock", made, "md5: 9a")
    assert said(project / "artifacts/package", capsys) == (
        f"warning: {project}/artifacts/package is out of date: the stage {waiting} has not run since its input "
        "changed; run `dvc repro`, or wait for it\n"
    )


@pytest.mark.slow
def test_a_stage_that_ran_alone_in_a_built_project_is_seen(built, tmp_path):
    project = built.copy(tmp_path / "project")
    command = ["clip-deploy", "predict", str(tmp_path / "none.png"), "a dog"]
    assert project.run(*command, check=False).stderr.startswith("error: ")
    project.edit("params.yaml", "opset: 18", "opset: 20")
    project.run("dvc", "repro", "export_onnx")
    assert "warning: artifacts/package is out of date: " in project.run(*command, check=False).stderr


def test_a_target_that_was_taken_out_of_params_gets_none(project, capsys):
    """DVC leaves its entries in dvc.lock, where nothing reads anew."""
    (project / "dvc.lock").write_text(LOCK.replace("torch-fp32", "ort-old").replace("1a.dir", "9a.dir", 1))
    assert said(project / "artifacts/package", capsys) == ""
    edited(project / "params.yaml", "optimize:\n", "optimize:\n  ort-old: {precision: fp32}\n")
    assert "the stage validate@ort-old has not run" in said(project / "artifacts/package", capsys)


def test_a_package_elsewhere_or_without_a_project_gets_none(project, capsys):
    edited(project / "params.yaml", "model: tiny-shapes", "model: local")
    (project / "artifacts/package").rename(project / "mine")
    assert said(project / "mine", capsys) == ""
    (project / "mine").rename(project / "artifacts/package")
    (project / "dvc.lock").unlink()
    assert said(project / "artifacts/package", capsys) == ""


@pytest.mark.parametrize("words", [["embed", "none", "out"], ["predict", "none.png"], ["search", "none", "a dog"]])
def test_each_command_that_opens_a_package_says_so(project, words, capsys):
    edited(project / "params.yaml", "model: tiny-shapes", "model: local")
    (project / "none").mkdir()
    (project / "none/a.png").write_bytes(b"x")
    assert main(words) == 1
    assert capsys.readouterr().err.startswith("warning: artifacts/package is out of date: ")


def test_wrong_usage_is_named_where_there_is_no_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["predict", "a.jpg", "--top", "two"])
    assert ended.value.code == 2
    assert "argument --top: invalid int value: 'two'" in capsys.readouterr().err
