"""Points that jobs measure in checkouts of their own: where a job is killed nothing is lost, and nothing done twice."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.project import ROOT, Project, warm_python
from support.sweeps import measured, point

from clip_deploy.__main__ import main
from clip_deploy.commands import sweep_workers
from clip_deploy.commands.sweep_workers import Job, answered, last_error, measure, open_engine, place
from clip_deploy.core.errors import DataError, DeployError, UnavailableError
from clip_deploy.core.manifest import verify
from clip_deploy.report.sweep import as_markdown, shown

JOB = Job("/a", "ab" * 20, "mine-1", ("-S", "seed=1"))
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "init.defaultBranch=main")


def test_a_job_without_an_answer_is_given_out_again():
    said = [RuntimeError("the node failed\nand more"), None]

    def engine(job):
        assert job == JOB
        found = said.pop(0)
        if found:
            raise found

    assert answered(engine, JOB) is None
    said[:] = [RuntimeError("the node failed\nand more")] * 3
    assert answered(engine, JOB) == "3 jobs ended without an answer: the node failed"
    assert not said
    assert answered(lambda job: "no such node", JOB) == "no such node"  # that is an answer


def test_engines_that_are_none_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"--on is 'pbs': accepted are slurm, local \(submitit on this machine\), ray"):
        open_engine("pbs", tmp_path, {})
    with pytest.raises(DeployError, match=r"--on local: .*no_such"):
        open_engine("local", tmp_path, {"no_such": 1})
    if not any((Path(folder) / "srun").exists() for folder in os.environ["PATH"].split(os.pathsep)):
        with pytest.raises(DeployError, match="--on slurm: "):
            open_engine("slurm", tmp_path, {})
    monkeypatch.setattr(sweep_workers, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"need submitit: pip install 'clip-deploy\[sweep\]'"):
        open_engine("local", tmp_path, {})


def test_jobs_need_a_remote_to_share_through(here, capsys):
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "Start"]):
        subprocess.run([*GIT, *words], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)
    subprocess.run([*GIT, "commit", "-q", "-m", "Begin with DVC"], check=True)
    assert main(["sweep", "opsets", "--on", "local"]) == 1
    assert "and there is none: `dvc remote add -d NAME URL`" in capsys.readouterr().err


def test_a_commit_or_a_repository_that_is_not_there_is_an_error_of_one_line(tmp_path):
    with pytest.raises(DeployError, match=r"git clone .*failed"):
        measure(replace(JOB, repository=str(tmp_path / "none")))
    subprocess.run([*GIT, "init", "-q", str(tmp_path / "empty")], check=True)
    with pytest.raises(DeployError, match=r"git checkout .*failed: .*abab"):
        measure(replace(JOB, repository=str(tmp_path / "empty")))


def test_a_point_that_was_pushed_already_is_not_measured_again(tmp_path):
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "Start"]):
        subprocess.run([*GIT, *words], check=True, cwd=tmp_path)
    commit = subprocess.run([*GIT, "rev-parse", "HEAD"], check=True, cwd=tmp_path, capture_output=True, text=True)
    job = replace(JOB, repository=str(tmp_path), commit=commit.stdout.strip())
    assert measure(job) is not None  # there is no DVC project here
    subprocess.run([*GIT, "update-ref", place(job.commit, job.name), "HEAD"], check=True, cwd=tmp_path)
    assert measure(job) is None


def test_the_reason_is_the_stages_own_or_the_last_line():
    assert last_error("a\nerror: seed is -1\nERROR: failed to reproduce\n") == "seed is -1"
    assert last_error("a\nERROR: failed to reproduce\n\n") == "ERROR: failed to reproduce"
    assert last_error("") == "no word"


def test_points_of_two_machines_are_compared_among_their_own_alone():
    points = [
        replace(point("a", 2.0), machine="EPYC"),
        replace(point("b", 4.0, **{"onnx.opset": 20}), machine="EPYC"),
        replace(point("c", 3.0), machine="Xeon"),
        replace(point("d", 2.5, **{"onnx.opset": 20}), machine="Xeon"),
    ]
    text = as_markdown("mine", "ort-fp32", points)
    assert "| Experiment | opset | calibration | Machine | Gate |" in text
    assert "| `b` * | 20 | minmax | EPYC | pass |" in text
    assert "| `c` * | 18 | minmax | Xeon | pass |" in text  # though b is faster, on another machine
    assert "| `d` | 20 | minmax | Xeon | pass |" in text
    assert "## What each value does: EPYC" in text
    assert "| opset | 20 | 1 | 2.50 | 2.50 |" in text.partition("## What each value does: Xeon")[2]
    assert "Machine" not in shown("mine", "ort-fp32", points[:2])


MINE = """\
target: ort-int8-dynamic
parameters:
  quantize.ort-int8-dynamic.per_channel: [false]
  conf/benchmark/quick.yaml:warmup: {warmups}
"""
# In every Python process: a line for each stage; and no wait of 15 seconds for what a killed job may have written.
NOTE = """
import os, sys
if "sweep" in sys.orig_argv and "local" in sys.orig_argv:
    from submitit.core.core import Job
    Job._results_timeout_s = 1
if sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith("stages."):
    with open(os.environ["STAGES_RAN"], "a") as ran:
        print(sys.orig_argv[2].removeprefix("stages."), file=ran)
"""
DVC_S3, RAY = ROOT / "build" / "dvc-s3", ROOT / "build" / "ray"  # `make test` puts them there


@pytest.fixture(params=["submitit and a folder", "Ray and an object store"])
def cluster(request, tmp_path, monkeypatch):
    """What --on takes, and the address of a DVC remote, in an environment that has the libraries of both."""
    (tmp_path / "sitecustomize.py").write_text(NOTE)
    monkeypatch.setenv("STAGES_RAN", str(tmp_path / "stages"))
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = "local", str(tmp_path / "store")
    if request.param != "submitit and a folder":
        for needed in (DVC_S3, RAY):
            if not (needed / "ready").is_file():
                pytest.skip(f"no {needed.name}: make build/{needed.name}/ready")
        path += [str(DVC_S3), str(RAY)]
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        found = "ray:local", f"s3://{request.getfixturevalue('bucket').base_path}store"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    return found


@pytest.mark.slow
def test_a_job_that_is_killed_runs_again_and_what_jobs_built_comes_through_the_remote(built, cluster, tmp_path):
    engine, store = cluster
    points = 2 if engine == "local" else 1  # whose processes are forks of one with their libraries
    project = built.copy(tmp_path / "project")
    (project.path / "conf" / "sweep" / "mine.yaml").write_text(MINE.format(warmups=list(range(1, points + 1))))
    project.run("dvc", "remote", "add", "-d", "store", store)
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "Add a sweep and a remote")
    project.run("dvc", "push", "-q", "--run-cache")
    command = [warm_python(), "-m", "clip_deploy", "sweep", "mine", "--on", engine]
    running = subprocess.Popen(command, cwd=project.path, stdout=subprocess.PIPE, text=True)
    os.kill(_worker(running), signal.SIGKILL)
    output, _ = running.communicate()
    assert running.returncode == 0
    assert f"{points} points: {points} measured, 0 failed." in output
    assert len(measured(project)) == points
    assert set((tmp_path / "stages").read_text().split()) == {"probe", "quantize", "validate", "benchmark"}
    name = measured(project)[0].rpartition("/")[2]

    if engine == "local":  # what is here of a point is the same whoever measured it
        assert project.run(*command).stdout.count(": there already") == points
        table = project.run("env", "COLUMNS=160", "dvc", "exp", "show", "--only-changed", "--no-pager").stdout
        assert all(word in table for word in (".per_channel ", " warmup ", f"[{name}]"))
        assert "…" not in table  # which stands where a column is too wide
        assert len(project.run("dvc", "exp", "diff", "HEAD", name).stdout.splitlines()) < 25

    project.run("git", "clone", "-q", str(project.path), str(tmp_path / "clone"))
    there = Project(tmp_path / "clone")  # with a cache of its own, in which nothing is
    there.run("dvc", "pull")
    pulled = verify(there.path / "artifacts" / "ort-int8-dynamic")
    there.run("dvc", "exp", "pull", "origin", name)
    there.run("dvc", "exp", "apply", name)
    applied = verify(there.path / "artifacts" / "ort-int8-dynamic")
    assert pulled[1] == applied[1] == []
    assert pulled[0].files != applied[0].files
    assert "per_channel: false" in (there.path / "params.yaml").read_text()


def _worker(running):
    """The process that measures a point, once its run has begun: by its child, `dvc exp run`."""
    while True:
        assert running.poll() is None
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_run = " -m dvc exp run " in " ".join(process.cmdline())
                if is_run and process.environ().get("STAGES_RAN") == os.environ["STAGES_RAN"]:
                    return process.ppid()
        time.sleep(0.05)
