"""Sweeps: settings that are none are refused before any point is built, and a stop costs nothing that was measured."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.project import ROOT
from support.records import judged, zero_shot

from clip_deploy.__main__ import main
from clip_deploy.commands.sweep import Sweep, check_point, overrides, read_sweep
from clip_deploy.report.rows import Row
from clip_deploy.report.sweep import Point, as_markdown, best, effect

SHIPPED = sorted(path.stem for path in (ROOT / "conf" / "sweep").glob("*.yaml"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SHIPPED)
def test_every_point_of_a_sweep_that_is_shipped_is_accepted(here, name):
    sweep = read_sweep(name)
    points = sweep.points(name)
    for point in points:
        check_point(point, sweep.target)
    assert len({point.name for point in points}) == len(points) > 1


def test_points_are_all_combinations_with_names_that_stay():
    sweep = Sweep("ort-fp32", {"onnx.opset": [18, 20], "seed": [0, 1]})
    points = sweep.points("both")
    assert [list(point.settings.values()) for point in points] == [[18, 0], [18, 1], [20, 0], [20, 1]]
    assert points[0].name == Sweep("ort-fp32", {"seed": [0], "onnx.opset": [18]}).points("both")[0].name


def test_settings_are_written_as_hydra_reads_them():
    settings = {
        "onnx.opset": 20,
        "recommend.device": None,
        "onnx.classifier": ["a cat", "a dog"],
        "quantize.x.accuracy_budget": {"max_flips": 1.0},
        "conf/benchmark/quick.yaml:threads": 1,
    }
    assert overrides(Point("p", settings)) == {
        "params.yaml": [
            "++onnx.opset=20",
            "++recommend.device=null",
            '++onnx.classifier=["a cat", "a dog"]',
            "++quantize.x.accuracy_budget={max_flips:1.0}",
        ],
        "conf/benchmark/quick.yaml": ["++threads=1"],
    }


@pytest.mark.parametrize(
    ("target", "parameters", "said"),
    [
        ("ort-fp32", {"onnx.opset": [18, 99]}, ": params.yaml: onnx.opset is 99"),
        ("ort-fp32", {"onnx.opst": [18]}, "unknown key onnx.opst"),
        ("ort-fp99", {"onnx.opset": [18]}, "target is 'ort-fp99', not among targets: torch-fp32"),
        ("ort-fp32", {"conf/benchmark/none.yaml:threads": [1]}, "there is no conf/benchmark/none.yaml"),
        ("ort-fp32", {"model": ["tiny-shape"]}, "model is 'tiny-shape': accepted are"),
        ("ort-fp32", {"onnx..opset": [18]}, "mine-"),
    ],
)
def test_a_point_with_settings_that_are_none_is_refused_before_any_is_built(here, target, parameters, said, capsys):
    text = f"target: {target}\nparameters: {parameters}\n"
    (here / "conf" / "sweep" / "mine.yaml").write_text(text)
    assert main(["sweep", "mine"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("target: ort-fp32\n", "give a target, and parameters with at least one value each"),
        ("target: ort-fp32\nparameters: {seed: []}\n", "give a target, and parameters with at least one value each"),
        ("targets: [ort-fp32]\n", "targets"),
        ("parameters: {seed: 3}\ntarget: ort-fp32\n", "parameters.seed"),
    ],
)
def test_a_file_of_another_form_is_refused(here, text, said, capsys):
    (here / "conf" / "sweep" / "mine.yaml").write_text(text)
    assert main(["sweep", "mine"]) == 1
    assert said in capsys.readouterr().err


def test_an_unknown_sweep_is_named_with_those_there_are(here, capsys):
    assert main(["sweep", "int9"]) == 1
    assert f"accepted are {', '.join(SHIPPED)}" in capsys.readouterr().err


def test_what_is_not_committed_is_named(here, capsys):
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com"]
    assert main(["sweep", "opsets"]) == 1
    assert "there is no commit here" in capsys.readouterr().err
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "Start"]):
        subprocess.run([*git, *words], check=True)
    (here / "params.yaml").write_text((here / "params.yaml").read_text() + "# mine\n")
    assert main(["sweep", "opsets"]) == 1
    assert "error: params.yaml is not committed: a sweep begins at a commit" in capsys.readouterr().err


def point(name, image, size=4.0, drop=0.0, **other):
    timings = {tower: {1: judged(speedup=image, speedup_low=image, speedup_high=image)} for tower in ("vision", "text")}
    row = Row("ort-fp32", "pass", timings=timings, size_mb=size, zero_shot=zero_shot(top1=90.0 - drop, top1_drop=drop),
              cosine_min={"vision": 0.999, "text": 0.9999}, flips=0.5, memory_mb=40.0)  # fmt: skip
    return Point(name, {"onnx.opset": 18, "quantize.a.calibration": "minmax", **other}, row)


def test_the_table_has_every_point_what_failed_and_the_front():
    points = [
        point("slow", 2.0),
        point("fast", 4.0, **{"onnx.opset": 20}),
        point("small", 3.0, size=2.0),
        Point("bad", {"onnx.opset": 22, "quantize.a.calibration": "minmax"}, None, "no such node"),
        Point("later", {"onnx.opset": 23, "quantize.a.calibration": "minmax"}),
    ]
    assert best(points) == {"fast", "small"}
    text = as_markdown("mine", "ort-fp32", points)
    assert "5 points: 3 measured, 1 failed." in text
    assert (
        "| `fast` * | 20 | minmax | pass | 2.00 | 4.00x | 2.00 | 4.00x | 90.0 | 0.00 | 0.500 | 0.9990 | 4.00 |" in text
    )
    assert "| `slow` | 18 | minmax | pass |" in text
    assert "| `bad` | 22 | minmax | failed | - |" in text
    assert "| `later` | 23 | minmax | - | - |" in text
    assert "- `bad` failed: no such node" in text
    assert "| opset | 18 | 2 | 2.45 [2.00, 3.00] |" in text  # the geometric mean of 2 and 3
    assert "| calibration | minmax |" not in text  # which has one value


def test_values_may_be_lists():
    text = as_markdown("mine", "ort-fp32", [point("a", 2.0, keep=[]), point("b", 4.0, keep=["vision: MatMul_7"])])
    assert "| keep | ['vision: MatMul_7'] | 1 | 4.00 | 4.00 |" in text


def test_an_effect_is_a_mean_with_an_interval():
    assert effect([], geometric=False) == "-"
    assert effect([3.0], geometric=True) == "3.00"
    assert effect([1.0, 4.0], geometric=True).startswith("2.00 [1.00, 4.00]")
    assert effect([1.0, 2.0, 3.0], geometric=False).startswith("2.00 [")


MINE = """\
target: ort-fp16
parameters:
  optimize.ort-fp16.keep_fp32: [[], ['vision: MatMul_999'], ['text: MatMul_999']]
"""


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_a_point_that_fails_keeps_its_reason(built, tmp_path):
    project = built.copy(tmp_path / "project")
    (project.path / "conf" / "sweep" / "mine.yaml").write_text(MINE)
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "Add a sweep")
    command = [sys.executable, "-m", "clip_deploy", "sweep", "mine"]
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    running = subprocess.Popen(command, cwd=project.path, env=environment, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    first = measured(project)
    while not (first := measured(project)):
        assert running.poll() is None
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    done = project.run(*command, check=False)
    assert done.returncode == 1
    assert done.stdout.count(": there already") == 1
    assert measured(project) == first  # and not measured anew
    assert "2 of 3 points failed: mine-" in done.stderr
    text = (project.path / "reports" / "sweep.md").read_text()
    assert "3 points: 1 measured, 2 failed." in text
    assert text.count("MatMul_999") >= 4
    again = project.run(*command, check=False)
    assert again.stdout.count(": there already") == 3
    project.run("git", "add", "reports/sweep.md")
    project.run("git", "commit", "-q", "-m", "Keep the table")
    assert "3 points: 1 measured, 2 failed." in project.run(*command, "--show").stdout


def measured(project):
    found = project.run("git", "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps/").stdout.splitlines()
    return [line for line in found if "/mine-" in line]
