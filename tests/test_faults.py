"""Faults with the real dvc: killed, a full disk, a rotten cache, two at once, runtimes that crash, hang or eat memory.

`make test` runs a part; `make reliability` runs all of it and writes reports/reliability.md.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from support.project import ROOT

from clip_deploy.core.environment import fingerprint
from clip_deploy.core.files import sha256

pytestmark = pytest.mark.slow

HOOKS = str(ROOT / "tests" / "support" / "faults")
STAGES = [
    "probe", "download", "prepare", "vectors", "export_torchscript@torchscript-fp32", "export_torchscript@torch-int8",
    "export_openvino@openvino-fp32", "export_onnx", "optimize@ort-fp32", "optimize@ort-fp16",
    "quantize@ort-int8-dynamic", "quantize@ort-int8-static", "validate@ort-fp32", "benchmark@ort-fp32", "recommend",
    "package", "triton_repository", "validate_serving", "validate_triton", "report",
]  # fmt: skip
MEASURED = {"benchmark"}  # whose results are never the same twice
SAME = defaultdict(lambda: "the same files", benchmark="a whole result")
CHEAP = "optimize@ort-fp32", "recommend", "package", "report"  # a target, one result, a folder, many files


def chosen(*representative):
    """Every stage, of which `make test` runs the representative ones."""
    marks = {name: () if name in representative else (pytest.mark.reliability,) for name in STAGES}
    return [pytest.param(name, marks=marks[name]) for name in STAGES]


@pytest.fixture(scope="module")
def project(built, tmp_path_factory):
    """One copy for all faults: each test leaves it whole."""
    return built.copy(tmp_path_factory.mktemp("faults") / "project")


@pytest.fixture
def fault(project, monkeypatch):
    """fault("kill 3", stage) in the stage's process, from here to the end of the test or to fault(None)."""

    def inject(what, stage=None):
        monkeypatch.delenv("FAULT", raising=False)
        if what:
            monkeypatch.setenv("PYTHONPATH", HOOKS)
            monkeypatch.setenv("FAULT", what)
            monkeypatch.setenv("FAULT_MODULE", f"stages.{kind(stage)}")

    yield inject
    for name in ("waiting", "go"):
        (project.path / name).unlink(missing_ok=True)


def kind(stage):
    return stage.split("@")[0]


def locked(project, stage):
    return project.lock()[stage]


def outputs(project, stage):
    return [project.path / out["path"] for out in locked(project, stage)["outs"]]


def contents(project, stage):
    """What the stage left: a hash of each output; its status where it is never the same twice."""
    if kind(stage) in MEASURED:
        return [json.loads(path.read_text())["status"] for path in outputs(project, stage)]
    return [fingerprint(path) if path.exists() else None for path in outputs(project, stage)]


def leftovers(project):
    return [path for folder in ("artifacts", "reports") for path in (project.path / folder).rglob(".*.partial")]


def is_clean(project, stage):
    return project.run("dvc", "status", stage).stdout.count("\n") <= 1  # "Data and pipelines are up to date."


def test_every_kind_of_stage_is_put_to_the_test():
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    kinds = {name for name, entry in pipeline.items() if "foreach" not in entry or items(params, entry["foreach"])}
    assert {kind(name) for name in STAGES} == kinds


def items(params, foreach):
    """What a stage is made for by default: of "${end_to_end.targets}", nothing."""
    for key in foreach.strip("${}").split("."):
        params = params[key]
    return params


@pytest.mark.parametrize("stage", chosen("optimize@ort-fp32", "report"))
def test_a_stage_that_is_killed_under_dvc_is_made_whole_by_the_next_run(stage, project, fault, outcomes):
    """At its first change of a file, then where the old output is gone and the new not yet in its place."""
    before = contents(project, stage)
    for moment in ("0", "os.rename"):
        fault(f"kill {moment}", stage)
        done = project.run("dvc", "repro", "-s", "-f", stage, check=False)
        assert f"failed to run: python -m stages.{kind(stage)}" in " ".join(done.stderr.split())
        assert stage == "probe" or not is_clean(project, stage)  # dvc takes no half-written file for whole
    fault(None)
    project.run("dvc", "repro", "-s", "-f", stage)  # with -f: the stage itself, not DVC's cache, must make it whole
    assert contents(project, stage) == before
    assert not leftovers(project)
    outcomes.fault("SIGKILL of the stage under dvc", done_by(project, stage), f"dvc fails; {again(stage)}", 2)
    project.run("git", "checkout", "-q", "reports", "dvc.lock")  # later stages read what was timed


@pytest.mark.parametrize("stage", chosen(*CHEAP))
def test_a_stage_that_is_killed_at_any_moment_leaves_nothing_half_written(stage, project, outcomes):
    before, runs = contents(project, stage), sweep(project, stage, "kill")
    kills, repaired = runs[::2], runs[1::2]
    assert len(kills) == len(repaired) >= 3
    assert "os.rename" in {event for _, event, *_ in kills}
    whole = repaired[-1][-1]
    for _, event, path, code, _, state in kills:
        assert code == -signal.SIGKILL, (event, path)
        assert kind(stage) in MEASURED or state.items() <= whole.items(), (event, path)  # each file, if there, is whole
        for out in map(str, outputs(project, stage)):
            left, made = ({name for name in files if name.startswith(out)} for files in (state, whole))
            assert left in (set(), made), (event, path)  # and each folder
    for _, _, _, code, said, state in repaired:
        assert code == 0, said
        assert state.keys() == whole.keys()
        assert kind(stage) in MEASURED or state == whole
    assert contents(project, stage) == before
    assert not leftovers(project)
    outcomes.fault("SIGKILL from its first to its last change", done_by(project, stage), again(stage), len(kills))
    project.run("git", "checkout", "-q", "reports", "dvc.lock")


def again(stage):
    return f"the next run gives {SAME[kind(stage)]}"


def done_by(project, stage):
    """The stage, and, where this machine lacks its library, that it did no more than to write so."""
    (first, *_) = outputs(project, stage)
    path = first / "target.json" if (first / "target.json").is_file() else first
    record = json.loads(path.read_text()) if path.suffix == ".json" else {}
    missing = isinstance(record, dict) and (record.get("unavailable") or record.get("status") == "unavailable")
    return f"{stage}, which only says that its library is missing here" if missing else stage


def sweep(project, stage, fault):
    """What sweep.py printed of each run of the stage's program: moment, event, path, exit code, message, hashes."""
    found, command = json.dumps(list(map(str, outputs(project, stage)))), shlex.split(locked(project, stage)["cmd"])[2:]
    program = ["python", "-c", "import sweep; sweep.main()", fault, found, *command]
    done = project.run("env", f"PYTHONPATH={HOOKS}", *program)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("stage", chosen("download", "recommend", "package", "report"))
def test_a_full_disk_at_every_write_is_one_message_and_costs_nothing(stage, project, outcomes):
    before = contents(project, stage)
    others = {path: sha256(path) for path in project.path.glob("artifacts/*/*.onnx")}
    runs = sweep(project, stage, "full")
    assert len(runs) >= 2
    for _, _, path, code, said, _ in runs:
        assert (code, "Traceback" in said) == (1, False), (path, said)
        assert said.splitlines()[-1].startswith("error: cannot write "), (path, said)
    assert contents(project, stage) == before
    assert {path: sha256(path) for path in others} == others
    assert not leftovers(project)
    outcomes.fault(
        "disk full from a file's writing on",
        done_by(project, stage),
        "one message, exit code 1, no half file",
        len(runs),
    )
    project.run("git", "checkout", "-q", "reports", "dvc.lock")  # later stages read what was timed


def test_a_file_system_without_space_is_one_message(project, tmp_path, outcomes):
    """A real one, of a megabyte: memory that is mapped to a file dies of SIGBUS there, which no limit shows."""
    mount = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    stage = shlex.join(
        [sys.executable, *shlex.split(locked(project, "prepare")["cmd"])[1:-1], f"output={tmp_path}/data"]
    )
    mounted = f"mount -t tmpfs -o size=1m none {tmp_path} && exec {stage}"
    done = project.run("unshare", "-m", "sh", "-c", mounted, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot write {tmp_path}/data/")
    assert "No space left on device; free some space" in done.stderr
    assert "Traceback" not in done.stderr
    outcomes.fault("a file system of 1 MB", "prepare", "one message, exit code 1")


def test_a_full_disk_stops_dvc_and_what_was_built_is_there(project, fault, outcomes):
    before = contents(project, "package")
    fault("full 0", "package")
    done = project.run("dvc", "repro", "-s", "-f", "package", check=False)
    fault(None)
    assert done.returncode != 0
    assert "error: cannot write artifacts/package: File too large; raise the limit" in done.stderr
    assert "Traceback" not in done.stderr
    project.run("dvc", "checkout", "artifacts/package")
    assert contents(project, "package") == before
    outcomes.fault("disk full under dvc", "package", "one message; the former package comes back from the cache")


def background(project, *command):
    return subprocess.Popen(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]],
        cwd=project.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        start_new_session=True,
    )


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes(module, folder):
    """Ids of the processes that run a stage in this project."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if module.encode() in path.read_bytes().split(b"\0") and os.readlink(path.with_name("cwd")) == str(folder):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it ended meanwhile
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="a process that dies with its parent is Linux's")
@pytest.mark.parametrize("shell", ["bash", "dash"])  # one becomes the command, the other waits for it
def test_a_killed_dvc_takes_its_stage_with_it_and_the_next_run_is_right(shell, project, fault, outcomes, monkeypatch):
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    monkeypatch.setenv("SHELL", shutil.which(shell))
    before = contents(project, "package")
    fault("wait 2", "package")
    dvc = background(project, "dvc", "repro", "-s", "-f", "package")
    wait_until((project.path / "waiting").exists)
    fault(None)
    assert processes("stages.package", project.path)
    dvc.kill()
    dvc.communicate()
    wait_until(lambda: not processes("stages.package", project.path))
    project.run("dvc", "repro", "-s", "-f", "package")
    assert contents(project, "package") == before
    assert not leftovers(project)
    same = "its stage ends with it; the next run gives the same files"
    outcomes.fault(f"SIGKILL of dvc, its commands run by {shell}", "package", same)


def test_a_second_repro_at_once_is_refused_and_the_first_ends_well(project, fault, outcomes):
    fault("wait 2", "package")
    first = background(project, "dvc", "repro", "-s", "-f", "package")
    wait_until((project.path / "waiting").exists)
    fault(None)
    second = project.run("dvc", "repro", "-s", "-f", "package", check=False)
    (project.path / "go").touch()
    said, _ = first.communicate(timeout=120)
    assert second.returncode != 0
    assert "is busy, it is being blocked by" in second.stderr
    assert first.returncode == 0, said
    assert is_clean(project, "package")
    outcomes.fault("two `dvc repro` at once", "package", "the second is refused; the first ends well")


def cached(project, path):
    """The object of DVC's cache that holds one file of an output."""
    for out in (out for stage in project.lock().values() for out in stage["outs"]):
        if Path(path).is_relative_to(out["path"]) and "md5" in out:
            objects = project.path / ".dvc/cache/files/md5"
            listed = json.loads((objects / out["md5"][:2] / out["md5"][2:]).read_text())
            name = str(Path(path).relative_to(out["path"]))
            digest = next(entry["md5"] for entry in listed if entry["relpath"] == name)
            return objects / digest[:2] / digest[2:]
    raise AssertionError(f"no stage writes {path}")


def rot(path):
    """Flip one bit, as a disk does: no other mode or size."""
    mode = path.stat().st_mode
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_target_that_rots_in_the_cache_is_not_used_and_can_be_built_anew(project, outcomes):
    before = contents(project, "optimize@ort-fp32")
    rotten = rot(cached(project, "artifacts/ort-fp32/vision.onnx")).relative_to(project.path)
    project.run("rm", "-r", "artifacts/ort-fp32")
    project.run("dvc", "repro", "-s", "optimize@ort-fp32")  # DVC takes a read-only object from its cache unread
    done = project.run("dvc", "repro", "-s", "-f", "quantize@ort-int8-dynamic", check=False)
    assert done.returncode != 0
    assert "error: artifacts/ort-fp32/vision.onnx is not the file that was built" in done.stderr
    assert f"`rm -r artifacts/ort-fp32 {rotten}` and `dvc repro`" in done.stderr
    project.run("rm", "-r", "artifacts/ort-fp32", str(rotten))
    project.run("dvc", "repro", "-s", "optimize@ort-fp32", "quantize@ort-int8-dynamic")
    assert contents(project, "optimize@ort-fp32") == before
    outcomes.fault("a bit of DVC's cache flips", "optimize", "the next stage refuses it; built anew as it says")


def test_a_package_that_rots_in_the_cache_does_not_open(project, outcomes):
    (graph,) = (
        path.relative_to(project.path).as_posix() for path in project.path.glob("artifacts/package/*/text.onnx")
    )
    rot(cached(project, graph))
    project.run("rm", "-r", "artifacts/package")
    project.run("dvc", "checkout", "artifacts/package")
    done = project.run(sys.executable, "-m", "clip_deploy", "predict", "x.png", "a red circle", check=False)
    assert done.returncode != 0
    assert f"{graph} is not the file that was packaged" in done.stderr
    cached(project, graph).unlink()
    project.run("dvc", "repro", "-s", "-f", "package")
    outcomes.fault("a bit of DVC's cache flips", "package", "the package does not open, and says which file")


# Runtimes that break, in the place of some that no target of this machine uses.
BROKEN = {
    "crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "time.sleep(600)",
    "needs more memory than there is": "bytearray(1 << 46)",
    "is killed as the kernel does when memory runs out": "os.kill(os.getpid(), signal.SIGKILL)",
}
RUNTIME = """
import os, signal, time

from clip_deploy.runtimes import ort


class Encoder(ort.Encoder):
    def encode_images(self, images):
        {fault}
"""
SAID = {
    "crashes": ("the process crashed with SIGSEGV", "the process crashed with SIGSEGV"),
    "hangs": ("no answer within 20 s: the process hung and was killed",) * 2,
    "needs more memory than there is": ("encoding failed: MemoryError", "MemoryError"),
    "is killed as the kernel does when memory runs out": ("crashed with SIGKILL, which happens when memory runs out",)
    * 2,
}
VICTIMS = dict(zip(BROKEN, ("onnx-fp32", "ort-fp16", "ort-int8-dynamic", "ort-int8-static"), strict=True))


@pytest.mark.reliability
def test_a_runtime_that_breaks_takes_its_own_row_only(built, tmp_path, outcomes):
    project = built.copy(tmp_path / "project")
    for (name, fault), runtime in zip(BROKEN.items(), ("openvino", "tensorrt", "ort_tensorrt", "fused"), strict=True):
        (project.path / f"clip_deploy/runtimes/{runtime}.py").write_text(RUNTIME.format(fault=fault))
        project.edit(f"artifacts/{VICTIMS[name]}/target.json", '"runtime": "ort"', f'"runtime": "{runtime}"')
    project.edit("conf/gates/standard.yaml", "fp32: {", "timeout_s: 20\nfp32: {")
    project.edit("conf/benchmark/quick.yaml", "threads: 1", "threads: 1\ntimeout_s: 20")
    rows = [*VICTIMS.values(), "ort-fp32"]
    stages = [f"{stage}@{row}" for row in rows for stage in ("validate", "benchmark")]
    project.run("dvc", "repro", "-s", *stages, "recommend", "report")
    table = (project.path / "reports/report.md").read_text()
    record = json.loads((project.path / "reports/targets.json").read_text())
    for name, victim in VICTIMS.items():
        checked, timed = (read(project, f"reports/{stage}/{victim}.json") for stage in ("validate", "benchmark"))
        assert (checked["status"], timed["status"], record[victim]["status"]) == ("fail", "unavailable", "fail")
        assert checked["reasons"][0].endswith(SAID[name][0])
        assert timed["reason"].endswith(SAID[name][1])
        assert SAID[name][0] in table
        for stage, said in zip(("validate", "benchmark"), SAID[name], strict=True):
            outcomes.fault(f"a runtime that {name}", stage, f"its row says `{said}`; the others are finished")
    assert record["ort-fp32"]["status"] == "pass"
    assert read(project, "reports/benchmark/ort-fp32.json")["status"] == "measured"


def read(project, path):
    return json.loads((project.path / path).read_text())
