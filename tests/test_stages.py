"""Each stage as a program: help, overrides, sweeps, errors, and what it imports."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from support.project import ROOT, TINY, Project
from support.records import timing
from support.stages import run_stage

from clip_deploy.checkpoint.layout import looked_at
from clip_deploy.core.artifact import write_manifest
from clip_deploy.core.environment import fingerprint
from clip_deploy.core.errors import DeployError
from stages import _check_inputs
from stages.benchmark import said
from stages.probe import identity

STAGES = sorted({path.stem for path in (ROOT / "stages").glob("[a-z]*.py")})


def run(*arguments, cwd=ROOT, code=None):
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m"]
    return subprocess.run([*command, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_explains_itself(name):
    done = run_stage(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "Settings (key=value overrides them" in done.stdout
    assert "output: ???" in done.stdout


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (2.9, 3.1, "p50 2.00 ms, 3.00x [2.90, 3.10]"),
        (0.4, 60.0, "p50 2.00 ms, ~ 3.00x [0.40, 60.00], which decides nothing: the machine was busy"),
        (float("nan"), float("nan"), "p50 2.00 ms, ~ 3.00x [nan, nan], which decides nothing: the machine was busy"),
    ],
)
def test_benchmark_marks_a_speedup_that_decides_nothing(low, high, shown):
    assert said(timing(speedup_low=low, speedup_high=high)) == shown


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
    done = run_stage("validate", "output=x.json")
    assert done.returncode == 1
    assert done.stderr == "error: settings: source is ???: give a value\n"


def test_an_unknown_setting_is_named():
    done = run_stage("validate", "outptu=x.json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown key outptu: 'outptu' is none of gates, seed, source, ")


@pytest.mark.parametrize(
    ("name", "word", "said"),
    [
        ("benchmark", "benchmark.secs=1", "'secs' is none of batch_sizes, threads"),
        ("quantize", "quantize.nope.method=static", "'nope' is none of ort-int8-dynamic"),
        ("quantize", "quantize.ort-int8-static.accuracy_budget.flips=1", "'flips' is none of max_top1_drop, max_flips"),
    ],
)
def test_an_unknown_setting_within_a_section_is_named_with_the_known_ones(name, word, said):
    done = run_stage(name, word)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: unknown key {word.split('=')[0]}: {said}")


@pytest.mark.parametrize("word", ["model.architecture.model_type=clip", "model.allow=[crop]", "hydra.verbose=false"])
def test_a_known_setting_goes_through(word):
    done = run_stage("download", "model=vit-b-32-untrained", word, "--cfg", "job")
    assert (done.returncode, done.stderr) == (0, "")


def test_settings_are_printed_as_a_file_of_settings_has_them():
    done = run_stage("validate", "source=artifacts/ort-fp32", "--cfg", "job")
    assert yaml.safe_load(done.stdout)["source"] == "artifacts/ort-fp32"


@pytest.mark.parametrize("word", ["source=", "source=.", "output="])
def test_a_path_without_a_name_is_refused(word):
    words = {"source": "x", "reference": "x", "output": "x"} | {word.split("=")[0]: word.split("=")[1]}
    done = run_stage("benchmark", *(f"{name}={value}" for name, value in words.items()))
    assert done.returncode == 1
    assert done.stderr == f"error: {word.split('=')[0]} is '.': give a file or folder by its name\n"


def test_what_yaml_makes_of_a_label_is_refused_by_a_stage_that_runs_alone(tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("classifier: []", "classifier: [yes, no]")
    (tmp_path / "params.yaml").write_text(text)
    code = f"import sys; sys.path.append({str(ROOT)!r}); from stages.export_onnx import *; export_onnx()"
    done = run("export_onnx", "source=x", "output=x", cwd=tmp_path, code=code)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: params.yaml: onnx.classifier[0] is True, as YAML reads it: put text in quotes"
    )


def test_an_unknown_choice_is_named_with_the_known_ones():
    for words in (["benchmark=slow"], ["-m", "benchmark=quick,slow"], ["benchmark=null"]):
        done = run_stage("benchmark", *words)
        assert done.returncode == 1
        name = words[-1].removeprefix("benchmark=").removeprefix("quick,")
        assert done.stderr.startswith(f"error: benchmark is '{name}': accepted are gpu, quick, standard, thorough; ")
    assert "give benchmark=NAME, without +" in run_stage("benchmark", "+benchmark=quick").stderr


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("export_torchscript", ["source"]),
        ("optimize", ["source", "calibration"]),
        ("build_engine", ["source", "calibration"]),
    ],
)
def test_an_unknown_target_is_named_with_the_known_ones(name, read):
    done = run_stage(name, "target=nope", "output=o", *(f"{path}=x" for path in read))
    assert done.returncode == 1
    assert f"error: target is 'nope': {name} in params.yaml has " in done.stderr


def test_a_wrong_type_is_named():
    done = run_stage("benchmark", "benchmark.threads=many")
    assert done.returncode == 1
    assert "benchmark.threads" in done.stderr


def test_a_check_across_settings_speaks_before_work():
    done = run_stage("export_onnx", "onnx.opset=99", "source=nowhere", "output=x")
    assert done.returncode == 1
    assert done.stderr.startswith("error: settings: onnx.opset is 99 with onnx.exporter auto")


@pytest.mark.parametrize(
    ("name", "inputs", "alone"),
    [("benchmark", ["source", "reference"], True), ("export_onnx", ["source"], False)],
)
def test_what_is_timed_wants_the_machine_for_itself_and_builds_share_it(name, inputs, alone, monkeypatch):
    def turn(alone, waits):
        waits()
        raise DeployError(f"alone: {alone}")

    monkeypatch.setattr("stages.turn", turn)
    done = run_stage(name, *(f"{each}=x" for each in inputs), "output=y")
    assert done.stdout.startswith(f"{name} waits: a stage runs on this machine that is timed alone")
    assert done.stderr == f"error: alone: {alone}\n"


def test_a_sweep_runs_the_stage_for_each_value(onnx_target, tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for name in ("stages", "clip_deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = run(
        "stages.benchmark",
        f"source={onnx_target}",
        f"reference={onnx_target}",
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
import json, runpy, sys
for name, words in json.loads(sys.argv[1]).items():  # in one process: their imports take longest
    sys.argv = [name, *words]
    runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=True)
    print("HEAVY", name, sorted({"torch", "transformers"} & set(sys.modules)))
"""


WITHOUT_TORCH = {
    "probe": ["output=out/environment.json", "inputs=out/inputs.json"],
    "vectors": ["evaluation=artifacts/data/evaluation", "output=out/vectors.json"],
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
    "benchmark": ["source=artifacts/ort-fp32", "reference=artifacts/onnx-fp32", "output=out/b.json"],
    "recommend": [
        "validation=reports/validate",
        "benchmark_results=reports/benchmark",
        "built=artifacts",
        "evaluation=artifacts/data/evaluation",
        "portable=artifacts/data/portable",
        "shipped=out/shipped.json",
        "output=out/r.json",
    ],
    "triton_repository": [
        "package=artifacts/package",
        "benchmark_results=reports/benchmark",
        "output=out/triton",
    ],
    "validate_serving": [
        "package=artifacts/package",
        "evaluation=artifacts/data/evaluation",
        "output=out/s.json",
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
        "serving=reports/serving.json",
        "vectors=reports/vectors.json",
        "output=out",
    ],
}


@pytest.mark.slow
def test_stages_that_do_not_need_torch_do_not_import_it(built, tmp_path):
    project = built.copy(tmp_path / "project")
    done = run(json.dumps(WITHOUT_TORCH), cwd=project.path, code=IMPORTS)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("HEAVY ")]
    assert said == [f"HEAVY {name} []" for name in WITHOUT_TORCH]


JOBS = ("benchmark", "source=nowhere", "reference=nowhere", "-m")


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["output=timed.json", "benchmark=quick,thorough"], "timed.json"),
        (["output=a.json,b.json", "benchmark=quick,thorough"], "b.json"),
        (["output=timed-${benchmark.threads}.json", "benchmark.seconds=0.1,0.2"], "timed-2.json"),
    ],
)
def test_a_sweep_whose_jobs_would_overwrite_one_output_is_refused_before_any_runs(words, output, kinds):
    done = run_stage(*JOBS, *words)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: output is {output} in more than one of the sweep's ")
    assert "let it vary, for example 'output=timed-${hydra:job.num}.json'" in done.stderr
    kinds("27: a sweep with one output", before="the last job's result alone, exit 0", now=done.stderr)


@pytest.mark.parametrize(
    "words",
    [
        ["output=timed-${hydra:job.num}.json", "benchmark=quick,thorough"],
        ["output=timed-${benchmark.seconds}.json", "benchmark.seconds=0.1,0.2"],
        ["output=a.json,b.json", "benchmark=quick"],
        ["output=timed.json", "benchmark=quick"],
    ],
)
def test_a_sweep_whose_output_varies_runs(words):
    """Up to the first job, which finds no target."""
    done = run_stage(*JOBS, *words)
    assert (done.returncode, done.stderr.splitlines()[0][:36]) == (1, "error: nowhere is not a built target")


def test_the_help_says_how_a_sweeps_outputs_vary():
    assert "output=timed-${hydra:job.num}.json" in run_stage("benchmark", "--help").stdout


PRINTING = [
    ("clip_deploy", "--help"),
    ("clip_deploy", "why", "--help"),
    ("clip_deploy", "compare", "reports", "reports"),
    ("stages.benchmark", "--help"),
]


@pytest.mark.parametrize("command", PRINTING, ids=" ".join)
@pytest.mark.parametrize("buffered", [True, False])
def test_a_command_whose_output_nobody_reads_ends_without_a_word(command, buffered, kinds):
    """As `clip-deploy why | head -1`: the reader has gone before the command prints."""
    reader, writer = os.pipe()
    os.close(reader)
    variables = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, env=variables, text=True
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (141, 0)  # argparse forgives its own help
    kinds("26: `... | head`", before="a traceback, BrokenPipeError", now="no word, exit 141 as of SIGPIPE")


@pytest.fixture
def small(project):
    """A project whose pipeline is the probe alone."""
    path = project.path / "dvc.yaml"
    path.write_text(yaml.safe_dump({"stages": {"probe": yaml.safe_load(path.read_text())["stages"]["probe"]}}))
    return project


def commit(project):
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "Change")


def inputs_of(project, experiment):
    """What the probe of an experiment wrote, which DVC keeps under a reference of its own."""
    references = project.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.splitlines()
    (reference,) = [name for name in references if name.endswith(f"/{experiment}")]
    return json.loads(project.run("git", "show", f"{reference}:reports/inputs.json").stdout)


def test_an_experiment_in_a_folder_of_its_own_finds_what_lies_beside_the_repository(small, kinds):
    """What git does not track is there alone: the model, the data, the Triton server. What it tracks is its own."""
    tracked = small.path / "assets" / "tiny-shapes" / "tokenizer_config.json"
    shutil.copytree(TINY, small.path / "build" / "checkpoint")
    (small.path / "build" / "images" / "dogs").mkdir(parents=True)
    (small.path / "build" / "images" / "dogs" / "a.png").write_bytes(b"a")
    (small.path / "build/triton-venv/lib/python3.11/site-packages/numpy-1.26.4.dist-info").mkdir(parents=True)
    small.edit("params.yaml", "model: tiny-shapes", "model: local")
    small.edit("params.yaml", "data: shapes", "data: image-folder")
    for name, path in (("model/local", "build/checkpoint"), ("data/image-folder", "build/images")):
        file = small.path / "conf" / f"{name}.yaml"
        file.write_text(re.sub(r"^path:.*$", f"path: {path}", file.read_text(), flags=re.MULTILINE))
    commit(small)
    done = small.run("dvc", "exp", "run", "--temp", "-n", "aside", check=False)
    assert done.returncode == 0, done.stderr
    inputs = inputs_of(small, "aside")
    assert inputs == {
        "data": fingerprint(small.path / "build" / "images"),
        "model": fingerprint(TINY, looked_at(TINY)),
        "triton": "numpy 1.26.4",
    }
    assert not (small.path / "reports" / "inputs.json").exists()
    small.edit("conf/model/local.yaml", "path: build/checkpoint", "path: assets/tiny-shapes")
    commit(small)
    tracked.write_text("{}")  # as the experiment is queued; then it changes here
    small.run("dvc", "exp", "run", "--queue", "-n", "queued")
    tracked.write_text("[]")
    small.run("dvc", "exp", "run", "--run-all")
    ran = inputs_of(small, "queued")["model"]
    own = small.path / "assets" / "tiny-shapes"
    assert ran != fingerprint(own, looked_at(own))
    tracked.write_text("{}")
    assert ran == fingerprint(own, looked_at(own))
    kinds(
        "25: a queued experiment, with a relative path",
        before="error: model.path is build/checkpoint: no such file or folder; triton: no server",
        now=f"found below the repository that owns the queue; triton: {inputs['triton']}",
    )


def test_a_clone_with_windows_line_ends_in_a_path_with_a_space_has_the_same_bytes_and_runs(small, tmp_path, kinds):
    commit(small)
    tracked = small.run("git", "ls-files").stdout.splitlines()
    clone = Project(tmp_path / "a b" / "c")
    small.run("git", "clone", "-q", "-c", "core.autocrlf=true", ".", str(clone.path))
    changed = [name for name in tracked if (clone.path / name).read_bytes() != (small.path / name).read_bytes()]
    assert (len(tracked) > 200, changed) == (True, [])
    (clone.path / ".venv").symlink_to(sys.prefix)
    ready = clone.path / ".venv" / "ready"
    fresh = ["-o", ".venv/ready"] if ready.exists() else ["-W", "nothing", "-o", ".venv/ready"]
    done = clone.run("make", *fresh, "repro", check=False)
    assert done.returncode == 0, done.stderr
    assert "Running stage 'probe'" in done.stdout
    targets = re.findall(r"^([a-z][a-z0-9-]*):.*##", (clone.path / "Makefile").read_text(), re.MULTILINE)
    assert {"repro", "test"} < set(targets)
    said = clone.run("make", "--no-print-directory", "-n", "-B", *targets).stdout
    assert "a b" not in said  # no command names the folder that it runs in: nothing to split at the space
    kinds(
        "26: a path with a space, core.autocrlf=true",
        before="make: No such file or directory; all 43 stages stale",
        now=f"make repro runs; {len(changed)} of {len(tracked)} files differ",
    )


def test_in_a_folder_of_a_bigger_git_repository_paths_are_found(small, tmp_path, kinds):
    whole = Project(tmp_path / "whole")
    shutil.copytree(small.path, whole.path / "deploy" / "clip", ignore=shutil.ignore_patterns(".git", ".dvc"))
    inner = Project(whole.path / "deploy" / "clip")
    whole.run("git", "init", "-q", "-b", "main")
    inner.run("dvc", "init", "-q", "--subdir")
    inner.run("dvc", "repro")
    commit(inner)
    since = [sys.executable, "-m", "clip_deploy", "why", "--since", "HEAD"]
    said = inner.run(*since).stdout
    assert said == "nothing changed: only probe runs, as it always does\n"
    with (inner.path / "clip_deploy" / "core" / "json_files.py").open("a") as file:
        file.write("# touched\n")
    names = inner.run(
        sys.executable, "-c", "from clip_deploy.commands.why import uncommitted; print(uncommitted('clip_deploy'))"
    )
    assert names.stdout == "['clip_deploy/core/json_files.py']\n"
    kinds("26: why, in a folder of a bigger git repository", before="not in dvc.lock: never run", now=said)
