import json
import subprocess
import sys

import pytest

from benchmarks import between_runs


def page(**p50s):
    rows = [
        {"target": name, "timings": {"vision": {"1": {"p50_ms": value}}, "text": {}}} for name, value in p50s.items()
    ]
    return f'<script id="content">{json.dumps({"rows": rows})}</script>'


@pytest.fixture
def git(tmp_path, monkeypatch):
    """A repository whose only commit holds one model's report; returns its reports folder."""
    folder = tmp_path / "reports"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "report.html").write_text(page(**{"trt-fp16": 1.0, "ort-cuda-fp16": 2.0, "torch-fp32": 5.0}))
    monkeypatch.chdir(tmp_path)
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], check=True)
    monkeypatch.setattr(sys, "argv", ["between_runs", "HEAD", "reports"])
    return folder


def test_rows_of_two_runs_are_compared_but_those_that_wait_for_python(git):
    (git / "model" / "report.html").write_text(page(**{"trt-fp16": 1.1, "ort-cuda-fp16": 1.0, "torch-fp32": 50.0}))
    between_runs.main()
    text = (git / "between_runs.md").read_text()
    assert "| model | 2 | 1.55 | " in text
    assert "| 2.00 | ort-cuda-fp16 vision 1 |" in text


def test_the_same_report_says_nothing_of_two_runs(git):
    with pytest.raises(SystemExit, match="HEAD holds no other run"):
        between_runs.main()
    assert not (git / "between_runs.md").exists()


def test_a_revision_that_git_does_not_know_is_named(git, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["between_runs", "nowhere", "reports"])
    with pytest.raises(SystemExit, match="nowhere holds no other run of a model in reports"):
        between_runs.main()


def test_what_is_missing_on_the_command_line_is_said(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["between_runs", "HEAD"])
    with pytest.raises(SystemExit, match="REVISION FOLDER"):
        between_runs.main()
