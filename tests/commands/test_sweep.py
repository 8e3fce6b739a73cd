"""Sweeps: settings that are none are refused before any point is built, and a stop costs nothing that was measured."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.browser import PLACES, look, needs_chromium
from support.project import ROOT, programs
from support.sweeps import measured, point

from clip_deploy.__main__ import main
from clip_deploy.commands.sweep import Sweep, check_point, overrides, read_sweep
from clip_deploy.commands.sweep_leftovers import only_one, remove_leftovers
from clip_deploy.commands.sweep_search import Chooser, Range, Search
from clip_deploy.core.config import RecommendConfig
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.report.figures import Axis, parallel_figure
from clip_deploy.report.sweep import Point, as_markdown, as_page, best, effect, shown

SHIPPED = sorted(path.stem for path in (ROOT / "conf" / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_point_of_a_sweep_that_is_shipped_is_accepted(here, name):
    sweep = read_sweep(name)
    points = sweep.samples(name) if sweep.search else sweep.points(name)
    for each in points:
        check_point(each, sweep.target)
    assert len({each.name for each in points}) == len(points) > 1


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
        ("parameters: {seed: 3}\ntarget: ort-fp32\n", "parameters.seed is 3: give a list"),
        (
            "parameters: {seed: {low: 0, high: 3}}\ntarget: ort-fp32\n",
            "low and high need `search: {points: 24}` beside them",
        ),
        ("parameters: {seed: {low: 3}}\ntarget: ort-fp32\nsearch: {}\n", "parameters.seed has low: accepted are low"),
        ("parameters: {seed: {low: 3, high: 3}}\ntarget: ort-fp32\nsearch: {}\n", "low must be below high"),
        ("parameters: {seed: {low: a, high: 3}}\ntarget: ort-fp32\nsearch: {}\n", "low, high and step are numbers"),
        (
            "parameters: {seed: {low: 0, high: 3, log: true}}\ntarget: a\nsearch: {}\n",
            "log: true goes with low above 0",
        ),
        ("parameters: {seed: [1]}\ntarget: a\nsearch: {points: 0}\n", "points is 0, startup 8: give 1 or more"),
        (
            "parameters: {seed: [1]}\ntarget: a\nsearch: {objectives: [speed]}\n",
            "holds 'speed': accepted are vision_p50",
        ),
        ("parameters: {seed: [1]}\ntarget: a\nsearch: {objectives: []}\n", "give one or more, each once"),
    ],
)
def test_a_file_of_another_form_is_refused(here, text, said, capsys):
    (here / "conf" / "sweep" / "mine.yaml").write_text(text)
    assert main(["sweep", "mine"]) == 1
    assert said in capsys.readouterr().err


def test_an_unknown_sweep_is_named_with_those_there_are(here, capsys):
    assert main(["sweep", "int9"]) == 1
    assert f"accepted are {', '.join(SHIPPED)}" in capsys.readouterr().err


def test_only_a_grid_has_several_points_at_once(here, capsys):
    assert main(["sweep", "int8-search", "--jobs", "2"]) == 1
    assert "--jobs is 2: give 1 or more for a grid, and 1 for a search" in capsys.readouterr().err
    assert main(["sweep", "int8", "-j", "0"]) == 1
    assert "--jobs is 0" in capsys.readouterr().err


def test_points_of_another_commit_are_named_and_their_table_is_kept(here, capsys):
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "Start"]):
        subprocess.run([*git, *words], check=True)
    start = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (here / "reports").mkdir()
    (here / "reports" / "sweep.md").write_text("a table")
    name = read_sweep("opsets").points("opsets")[0].name
    subprocess.run([*git, "update-ref", f"refs/exps/{start[:2]}/{start[2:]}/{name}", "HEAD"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "Nothing of the tree"], check=True)
    assert main(["sweep", "opsets", "--show"]) == 1  # the experiment holds no reports
    assert "no point of opsets was measured here" in capsys.readouterr().err
    assert (here / "reports" / "sweep.md").read_text() == "a table"
    (here / "params.yaml").write_text((here / "params.yaml").read_text() + "# mine\n")
    (here / "reports" / "sweep.md").write_text("a table")
    subprocess.run([*git, "commit", "-q", "-a", "-m", "Another tree"], check=True)
    assert main(["sweep", "opsets", "--show"]) == 1
    assert f"and 1 at {start[:12]}: `git switch --detach {start[:12]}` shows those" in capsys.readouterr().err
    assert (here / "reports" / "sweep.md").read_text() == "a table"


def test_what_is_not_committed_is_named(here, capsys):
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com"]
    assert main(["sweep", "opsets"]) == 1
    assert "this repository has no commit" in capsys.readouterr().err
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "Start"]):
        subprocess.run([*git, *words], check=True)
    (here / "params.yaml").write_text((here / "params.yaml").read_text() + "# mine\n")
    assert main(["sweep", "opsets"]) == 1
    assert (
        "error: params.yaml is not committed: a sweep begins at a commit, so that its rows compare; `git commit -am"
        in capsys.readouterr().err
    )


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
        "| `fast` * | 20 | minmax | pass | 2.00 | 4.00x [4.00, 4.00] | 2.00 | 4.00x [4.00, 4.00] | 90.0 | 0.00 | 0.500 "
        "| 0.9990 | 4.00 |"
    ) in text
    assert "| Image speed-up [95 %] |" in text
    assert "Times and speed-ups over torch-fp32 are of a call at the smallest batch size." in text
    assert "Times and drops are alike where their intervals overlap, cosines within 0.0001, sizes within 5 %." in text
    assert "| `slow` | 18 | minmax | pass |" in text
    assert "| `bad` | 22 | minmax | failed | - |" in text
    assert "| `later` | 23 | minmax | - | - |" in text
    assert "- `bad` failed: no such node" in text
    assert "| opset | 18 | 2 | 2.45 [2.00, 3.00] |" in text  # the geometric mean of 2 and 3
    assert "| calibration | minmax |" not in text  # which has one value


def test_a_terminal_shows_few_columns_and_the_page_all_that_was_drawn():
    points = [
        point("slow", 2.0),
        point("fast", 4.0, **{"onnx.opset": 20}),
        Point("later", {"onnx.opset": 22, "quantize.a.calibration": "minmax"}),
    ]
    assert "| Experiment | opset | calibration | Gate | Image p50 ms | Text p50 ms | Drop, points | Size MB |" in shown(
        "mine", "ort-fp32", points
    )
    text = as_page("mine", "ort-fp32", points)
    assert "<title>Sweep mine: ort-fp32</title>" in text
    assert text.count("<svg") == 2
    assert "slow: opset 18.0, image ms 2.00" in text  # what a screen reader says of a line
    assert "<code>dvc exp apply fast</code>: opset 20, calibration minmax" in text


@needs_chromium
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_of_the_page_is_cut_off_or_covered_at_a_phones_width(width, tmp_path):
    settings = [(opset, kind, share) for opset in (18, 20) for kind in ("minmax", "entropy") for share in range(1, 7)]
    points = [
        point(f"mine-{number:08}", 2 + number % 7, size=4 + opset / 10, drop=share / 9,
              **{"onnx.opset": opset, "quantize.a.calibration": kind, "quantize.a.smooth_quant": share / 7})
        for number, (opset, kind, share) in enumerate(settings)
    ]  # fmt: skip
    found, console = look(as_page("mine", "ort-int8-static", points), tmp_path, width, f"{PLACES} return places;")
    assert console == []
    assert found["wide"] <= found["inner"] == width
    assert found["texts"] > 20
    assert found["cut"] == []
    assert set(found["covered"]) <= {
        "calibration on smooth_quant"
    }  # names of axes, whose boxes meet as they are turned


def test_settings_whose_names_end_alike_are_told_apart():
    found = [
        point("a", 2.0, **{"x.one.kind": 1, "x.two.kind": 2}),
        point("b", 3.0, **{"x.one.kind": 3, "x.two.kind": 4}),
    ]
    assert "| opset | calibration | x.one.kind | x.two.kind |" in as_markdown("mine", "ort-fp32", found)


def test_an_upright_runs_from_the_lowest_to_the_highest():
    assert Axis("a", [3.0, None, 1.0, 2.0]).marks() == [(1.0, "1.00"), (3.0, "3.00")]
    assert [Axis("a", [3.0, None, 1.0]).share(value) for value in (1.0, 2.0, 3.0)] == [0.0, 0.5, 1.0]
    assert Axis("a", [2.0, 2.0]).share(2.0) == 0.5
    axes = [Axis("kind", [0.0, 1.0], ["minmax", "entropy"]), Axis("ms", [1.0, None])]
    figure = parallel_figure(axes, ["one", "two"], ["passes its gate", "misses its gate"])
    drawn = {(each["line"], each["axis"]): each["up"] for each in figure.spec["data"]["values"]}
    assert drawn == {("one", "kind"): 0.0, ("one", "ms"): 0.5, ("two", "kind"): 1.0}
    assert (
        "one: kind minmax, ms 1.00; two: kind entropy" in figure.description
        or "two: kind entropy; one: kind minmax" in figure.description
    )


PARAMETERS = {"calibration": ["minmax", "entropy", ["both"]], "share": Range(0.1, 0.9), "threads": Range(1, 7, step=2)}


def found_at(settings):
    """Faster with every thread, more accurate with less of a share; 'entropy' fails, 0.8 and more misses the gate."""
    if settings["calibration"] == "entropy":
        return None
    row = point("a", 1.0 + settings["threads"], drop=10 * settings["share"]).row
    row.status = "fail" if settings["share"] > 0.8 else "pass"
    row.reasons = ["top-1"]
    return row


def searched(count, **changes):
    chooser, asked = Chooser(PARAMETERS, Search(points=count, startup=5, **changes), RecommendConfig()), []
    for _ in range(count):
        asked.append(chooser.ask())
        chooser.tell(found_at(asked[-1]))
    return chooser, asked


def test_a_search_asks_for_the_same_points_again_and_learns_from_what_it_is_told():
    chooser, asked = searched(40, objectives=["vision_p50_ms", "top1_drop"])
    again = searched(40, objectives=["vision_p50_ms", "top1_drop"])[1]
    assert again == asked
    assert all(0.1 <= each["share"] <= 0.9 and each["threads"] in (1, 3, 5, 7) for each in asked)
    assert all(len(str(each["share"])) <= 5 for each in asked)
    assert {str(each["calibration"]) for each in asked[:20]} == {"minmax", "entropy", "['both']"}
    share = [sum(each["share"] for each in part) / len(part) for part in (asked[:5], asked[20:])]
    assert share[1] < share[0]  # it has found where the accuracy is
    assert all(trial.params["share"] <= 0.8 for trial in chooser.study.best_trials)


def test_an_objective_that_was_not_measured_is_no_result():
    chooser = Chooser({"seed": [0, 1]}, Search(objectives=["memory_mb"]), RecommendConfig())
    chooser.ask()
    row = point("a", 2.0).row
    row.memory_mb = None
    chooser.tell(row)
    assert chooser.study.trials[0].state.name == "FAIL"


def test_without_optuna_a_search_says_what_to_install(monkeypatch):
    monkeypatch.setattr("clip_deploy.commands.sweep_search.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install 'clip-deploy\\[sweep\\]'"):
        Chooser({"seed": [0]}, Search(), RecommendConfig())


def test_values_may_be_lists():
    text = as_markdown("mine", "ort-fp32", [point("a", 2.0, keep=[]), point("b", 4.0, keep=["vision: MatMul_7"])])
    assert "| keep | ['vision: MatMul_7'] | 1 | 4.00 | 4.00 |" in text


def test_an_effect_is_a_mean_with_an_interval():
    assert effect([], geometric=False) == "-"
    assert effect([3.0], geometric=True) == "3.00"
    assert effect([1.0, 4.0], geometric=True).startswith("2.00 [1.00, 4.00]")
    assert effect([1.0, 2.0, 3.0], geometric=False).startswith("2.00 [")
    assert effect([0.1, 0.2, -0.3, 1e-6], geometric=False).startswith("0.00 [")


def copies(project):
    """DVC's copies of the project, by the experiments that run in them."""
    facts = [json.loads(path.read_text()) for path in project.glob(".dvc/tmp/exps/standalone/run/*/*.run")]
    return {fact["name"]: Path(fact["root_dir"]) for fact in facts if Path(fact["root_dir"]).is_dir()}


def leave(project, name, number=1):
    """A copy as a killed run of that name leaves it."""
    standalone = project / ".dvc" / "tmp" / "exps" / "standalone"
    (standalone / f"tmp{number}").mkdir(parents=True)
    (standalone / "run" / f"{number}").mkdir(parents=True)
    facts = {"name": name, "root_dir": str(standalone / f"tmp{number}")}
    (standalone / "run" / f"{number}" / f"{number}.run").write_text(json.dumps(facts))
    return standalone / f"tmp{number}"


def test_only_copies_of_killed_runs_of_the_same_sweep_are_removed(here, capsys):
    names = ["mine-0123abcd", "mine-2-0123abcd", "mine-by-hand", "other-0123abcd", None]
    for number, name in enumerate(names):
        leave(here, name, number)
    (here / "elsewhere").mkdir()
    leave(here, "mine-4567abcd", 10)
    facts = here / ".dvc/tmp/exps/standalone/run/10/10.run"
    facts.write_text(json.dumps({"name": "mine-4567abcd", "root_dir": str(here / "elsewhere")}))
    (facts.parent / "half.run").write_text('{"name": "mine-45')
    with only_one("mine"):
        assert capsys.readouterr().out == "removed what a killed run left: .dvc/tmp/exps/standalone/tmp0\n"
    facts.with_name("half.run").unlink()
    assert set(copies(here)) == {*names[1:], "mine-4567abcd"}


def test_a_copy_in_which_a_process_works_stays(here):
    copy = leave(here, "mine-0123abcd")
    with subprocess.Popen(["sleep", "60"], cwd=copy) as process:
        remove_leftovers("mine")
        process.kill()
    assert copy.is_dir()
    remove_leftovers("mine")
    assert not copy.exists()


def test_what_a_sweep_started_holds_it_as_long_as_it_lives(here):
    copy = leave(here, "mine-0123abcd")
    with only_one("other"), only_one("mine") as lock:
        left = subprocess.Popen(["sleep", "60"], pass_fds=lock)
    again = leave(here, "mine-0123abcd", 2)
    with pytest.raises(DeployError, match="another sweep mine runs in this project"), only_one("mine"):
        pass
    assert (copy.exists(), again.exists()) == (False, True)
    left.kill()
    left.wait()
    with only_one("mine"):
        assert not again.exists()


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
    environment = {**os.environ, "PATH": f"{programs()}{os.pathsep}{os.environ['PATH']}"}
    running = subprocess.Popen(command, cwd=project.path, env=environment, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while not copies(project.path):
        assert running.poll() is None
        time.sleep(0.1)
    assert "error: another sweep mine runs in this project" in project.run(*command, check=False).stderr
    while not ((first := measured(project)) and any(name not in first[0] for name in copies(project.path))):
        assert running.poll() is None
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    done = project.run(*command, "--jobs", "2", check=False)
    assert done.returncode == 1
    assert done.stdout.count(": there already") == 1
    assert done.stdout.count("removed what a killed run left: .dvc/tmp/exps/standalone/tmp") == 1
    assert copies(project.path) == {}
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


SEARCHED = """\
target: ort-fp16
parameters:
  conf/benchmark/quick.yaml:warmup: {low: 1, high: 1000, log: true}
search: {points: 2, objectives: [vision_p50_ms, size_mb]}
"""


@pytest.mark.slow
def test_a_search_goes_on_with_the_points_that_it_asked_for(built, tmp_path):
    project = built.copy(tmp_path / "project")
    (project.path / "conf" / "sweep" / "mine.yaml").write_text(SEARCHED)
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "Add a search")
    command = [sys.executable, "-m", "clip_deploy", "sweep", "mine"]
    assert "2 points: 2 measured, 0 failed." in project.run(*command).stdout
    first = measured(project)
    again = project.run(*command, "--all")
    assert (again.stdout.count(": there already"), measured(project)) == (2, first)
    text = (project.path / "reports" / "sweep.md").read_text()
    assert again.stdout.endswith(text + "\n")
    assert "<svg" in (project.path / "reports" / "sweep.html").read_text()
    (project.path / "conf" / "sweep" / "mine.yaml").write_text(SEARCHED.replace("points: 2", "points: 3"))
    assert "conf/sweep/mine.yaml is not committed" in project.run(*command, check=False).stderr
