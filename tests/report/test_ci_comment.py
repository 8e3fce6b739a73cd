"""What a pull request's comment says of two revisions."""

import copy
import re

import pytest
from support.records import HARDWARE, advised, checked, parity, timing, zero_shot

from clip_deploy.core.config import CiConfig
from clip_deploy.core.parsing import plain
from clip_deploy.report.ci_comment import MARK, comment, moved, redrawn
from clip_deploy.report.ci_gate import Reports

TARGET = "ort-fp16"
TIMING = plain(timing(reference_p50_ms=1.48))
ALONE = {**TIMING, "p50_ms": 1.48, "speedup": 1.0, "speedup_low": 0.99, "speedup_high": 1.01}


def timed(**changes):
    towers = {tower: {"1": plain(timing(**{"reference_p50_ms": 1.48, **changes}))} for tower in ("vision", "text")}
    return {"status": "measured", "threads": 2, "towers": towers}


def reports_of(**files):
    """reports/ with one target beside the reference, and `files` in the place of some."""
    reference = {tower: {"1": ALONE} for tower in ("vision", "text")}
    sound = {
        "validate/torch-fp32.json": checked(size_mb=4.0),
        "benchmark/torch-fp32.json": {"status": "measured", "threads": 2, "towers": reference},
        f"validate/{TARGET}.json": checked(size_mb=2.0),
        f"benchmark/{TARGET}.json": timed(),
        "targets.json": {"torch-fp32": {"status": "pass"}, TARGET: {"status": "pass"}},
        "recommendation.json": advised({TARGET: {}}, summary={"winner": TARGET}),
        "environment.json": {"software": {}, "hardware": HARDWARE},
        "plots/latency.json": [{"target": TARGET, "p50_ms": 1.0}],
    }
    return copy.deepcopy(sound | files)


def moved_in(now, then=None):
    return moved(Reports(reports_of(**now).get), Reports(reports_of(**(then or {})).get), CiConfig())


def test_of_two_equal_revisions_nothing_moved():
    assert moved_in({}) == []
    assert redrawn(Reports(reports_of().get), Reports(reports_of().get)) == []


@pytest.mark.parametrize(
    ("now", "row"),
    [
        (
            {f"benchmark/{TARGET}.json": timed(speedup=4.0, speedup_low=3.9, speedup_high=4.1)},
            ["vision, batch 1: speed-up", "3.00 [2.90, 3.10]", "4.00 [3.90, 4.10]"],
        ),
        (
            {f"benchmark/{TARGET}.json": timed(speedup=2.0, speedup_low=1.9, speedup_high=2.1)},
            ["text, batch 1: speed-up", "3.00 [2.90, 3.10]", "2.00 [1.90, 2.10]"],
        ),
        ({f"validate/{TARGET}.json": checked(size_mb=1.0)}, ["size, MB", "2.00", "1.00"]),
        ({f"validate/{TARGET}.json": checked(size_mb=2.0, status="fail")}, ["gate", "pass", "fail"]),
        (
            {f"validate/{TARGET}.json": checked(size_mb=2.0, parity=plain({"vision": parity(0.9), "text": parity()}))},
            ["vision: lowest cosine", "1.000000", "0.900000"],
        ),
        (
            {f"validate/{TARGET}.json": checked(size_mb=2.0, zero_shot=plain(zero_shot(top1=80.0)))},
            ["top-1, %", "90.00", "80.00"],
        ),
    ],
    ids=["faster", "slower", "smaller", "fails", "less alike", "less accurate"],
)
def test_what_lies_beyond_its_interval_or_limit_is_a_row_for_better_or_worse(now, row):
    assert [f"`{TARGET}`", *row] in moved_in(now)


@pytest.mark.parametrize(
    "now",
    [
        {f"benchmark/{TARGET}.json": timed(speedup=3.15, speedup_low=3.05, speedup_high=3.25)},  # the intervals meet
        {f"benchmark/{TARGET}.json": timed(speedup=700.0, speedup_low=20.0, speedup_high=900.0)},  # of a busy machine
        {"environment.json": {"software": {}, "hardware": {**HARDWARE, "cpu": "another"}},
         f"benchmark/{TARGET}.json": timed(speedup=9.0, speedup_low=8.9, speedup_high=9.1)},
        {f"validate/{TARGET}.json": checked(size_mb=2.05)},
    ],
    ids=["within", "undecided", "another machine", "size"],
)  # fmt: skip
def test_what_does_not_is_left_out(now):
    assert moved_in(now) == []


def test_the_comment_says_it_all_in_one():
    now = reports_of(
        **{
            f"validate/{TARGET}.json": checked(size_mb=1.0),
            "recommendation.json": advised({TARGET: {}}, summary={"winner": "ort-int8"}),
            "plots/latency.json": [],
        }
    )
    present, former = Reports(now.get), Reports(reports_of().get)
    text = comment(
        "| table |", False, present, former, "main", CiConfig(), ["machine: unlike"], "https://ci/report.html"
    )
    assert text.startswith(f"{MARK}\n\n## clip-deploy: the gate is **shut**\n\n| table |\n\n<details>")
    assert "<details><summary>To know (1)</summary>\n\n- machine: unlike\n\n</details>" in text
    assert f"`ort-int8`; at main it was `{TARGET}`. [The report](https://ci/report.html)." in text
    assert (
        f"| Target | Quantity | main | now |\n| --- | --- | ---: | ---: |\n| `{TARGET}` | size, MB | 2.00 | 1.00 |"
        in text
    )
    assert "Others than at main: latency. `dvc plots diff main` shows both." in text
    same = comment("", True, former, former, "main", CiConfig())
    assert "the gate is open" in same
    assert f"`{TARGET}`, as at main." in same
    assert "### Beyond its interval since main\n\nNothing.\n" in same
    assert "The same as at main." in same


@pytest.mark.slow
def test_two_revisions_are_measured_on_one_machine_and_commented_on(built, tmp_path, monkeypatch):
    """FP16 gives way to FP32 under its name, of twice the size."""
    project = built.copy(tmp_path / "project")
    few = ("torch-fp32", "ort-fp16")  # rows of the table; all are built
    path = project.path / "params.yaml"
    path.write_text(re.sub(rf"^ *- (?!({'|'.join(few)})$)[a-z].*\n", "", path.read_text(), flags=re.MULTILINE))
    project.run("git", "commit", "-q", "-a", "-m", "Fewer targets")
    project.edit("params.yaml", "precision: fp16}", "precision: fp32}")
    project.run("git", "commit", "-q", "-a", "-m", "FP32 in the place of FP16")
    before = project.run("git", "status", "--porcelain").stdout
    monkeypatch.setenv("PYTHONPATH", "")
    done = project.run("bash", ".ci/pull-request", "HEAD~1", "comment.md", "https://ci/run", check=False)
    text = (project.path / "comment.md").read_text()
    assert done.returncode == 1
    assert done.stderr.endswith("error: not all of the 2 required targets pass: the table above says why\n")
    assert text.startswith(f"{MARK}\n\n## clip-deploy: the gate is **shut**")
    assert "| `ort-fp16` | size, MB | " in text
    assert "### Beyond its interval since HEAD~1" in text
    assert "[The report](https://ci/run)" in text
    assert project.run("git", "status", "--porcelain").stdout.replace("?? comment.md\n", "") == before
    report = (project.path / "build/head/reports/report.md").read_text()
    assert "| `ort-fp16` | fp32 | pass |" in report
