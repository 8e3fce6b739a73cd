"""A real Triton server, where `make triton-env` made its environment; without it these tests are skipped."""

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.project import ROOT
from support.records import drift, parity, served
from support.triton import ENVIRONMENT

from clip_deploy.core.config import TritonCheckConfig, TritonConfig
from clip_deploy.core.errors import ConfigError, DeployError, UnavailableError
from clip_deploy.core.package import read_package
from clip_deploy.core.served import Agreement, Fault, VersionStep
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.serving import server as running
from clip_deploy.serving.load_test import summary
from clip_deploy.serving.publish import publish, withdraw
from clip_deploy.serving.repository import write_repository
from clip_deploy.serving.server import Server, check_runtimes, find_environment, free_ports, serve, stop, versions
from clip_deploy.serving.validation import changed, check_answers, check_served, negate, spoil

SETTINGS = TritonCheckConfig(environment=str(ENVIRONMENT), concurrency=[2], seconds=0.2)


@pytest.fixture(scope="module")
def environment():
    try:
        return find_environment(ENVIRONMENT)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def repository(package, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_repository(package, folder / "no-benchmark", TritonConfig(), folder / "triton")
    return folder / "triton"


@pytest.fixture(scope="module")
def record(environment, repository, package, sets):
    """What a real server answers, once for all tests."""
    return check_served(repository, package, load_prepared(sets / "evaluation"), SETTINGS, seed=0)


@pytest.mark.slow
def test_a_real_server_answers_as_the_package_does(record):
    assert record.status == "pass", record.reasons
    found = record.answers.parity
    for name in ("images, http", "images, grpc", "texts, http", "texts, grpc"):
        assert found[name].cosine_min > 0.999999
    for name in ("probabilities, http", "probabilities, grpc"):
        assert found[name].same_answer_percent == 100
        assert found[name].max_abs_diff < 1e-3
    assert set(record.answers.asked.health.values()) == {200}


@pytest.mark.slow
def test_a_second_version_comes_and_goes_and_a_broken_one_is_refused_under_traffic(record):
    steps = record.answers.asked.versions
    second, broken, back = steps
    assert (second.ready, second.answers, second.refused) == (["1", "2"], "2", "")
    assert (broken.ready, broken.answers) == (["1", "2"], "2")
    assert "the server refuses clip_vision: load failed" in broken.refused
    assert (back.ready, back.answers) == (["1"], "1")
    assert [step.failed for step in steps] == [0, 0, 0], steps
    assert all(step.sent >= 50 for step in steps)
    assert all(step.right for step in steps)


@pytest.mark.slow
def test_the_server_survives_what_no_client_should_send(record):
    faults = record.answers.asked.faults
    answers = {fault.fault: fault.answer for fault in faults}
    assert all(fault.survived for fault in faults)
    assert answers["a model that is not there"].startswith("404")
    assert "batch-size must be <= 32" in answers["a batch of one more than accepted"]
    assert "30000 x 30000 pixels" in answers["an image of 900 million pixels"]
    assert "1 x 1000000 pixels" in answers["an image of 1 x 1 million pixels"]
    assert "text 2 of 2 is empty" in answers["a text of one blank"]
    assert answers["200 files from eight clients, half of them no images"] == "100 answered, 100 status 400"
    assert sum(fault.refused is True for fault in faults) == 13
    assert "at most 20000000 are accepted" in answers["an image file of 25 MB"]
    assert "cannot encode this request" in answers["token ids beyond the vocabulary"]
    assert "token ids run from -1 to -1" in answers["negative token ids"]
    assert answers["a client killed while four requests run"] == "killed"


@pytest.mark.slow
def test_every_metric_of_the_dashboard_is_one_that_the_server_exposes(record, repository):
    dashboard = json.loads((repository / "deploy" / "grafana-dashboard.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    named = set(re.findall(r"\bnv_\w+", queries))
    assert len(named) >= 11
    assert named <= set(record.answers.metrics)


@pytest.mark.slow
def test_load_is_measured_for_both_towers_the_cache_and_the_ensemble(record):
    rows = record.answers.load
    measured = [(row.model, row.protocol, row.note) for row in rows]
    assert measured == [
        ("clip_vision", "http", "one image"),
        ("clip_vision", "grpc", "one image"),
        ("clip_text", "grpc", "one text, cached"),
        ("clip_zero_shot", "grpc", "one image file, 8 texts"),
        ("clip_text", "grpc", "one text"),
    ]
    assert all(row.requests_per_s > 0 and len(row.windows_per_s) == 3 for row in rows)
    assert all(row.mean_batch >= 1 for row in rows if row.model != "clip_zero_shot")


@pytest.mark.slow
def test_texts_are_cached_and_errors_are_not(environment, repository, package, tmp_path):
    vocabulary = read_package(package).encoder.vocabulary
    text, other = [1, 2, 3, 4], [4, 3, 2, 1]
    with serve(repository / "python", environment, tmp_path / "server.log") as server:
        for wrong in ([vocabulary], [-1], [-vocabulary], [1, vocabulary + 5]):
            assert [embedded(server, [wrong])[0] for _ in range(3)] == [400] * 3
        first, alone = embedded(server, [text]), embedded(server, [other])
        assert first[0] == 200
        assert first == embedded(server, [text])
        assert embedded(server, [other, text, other]) == (200, [*alone[1], *first[1], *alone[1]])
        assert embedded(server, [text, [-1, 2, 3, 4]])[0] == 400
        assert embedded(server, [text]) == first


def embedded(server, texts):
    """Status and embeddings of clip_text's answer."""
    given = {"input_ids": texts, "attention_mask": [[1] * len(text) for text in texts]}
    shape = [len(texts), len(texts[0])]
    inputs = [{"name": name, "datatype": "INT64", "shape": shape, "data": data} for name, data in given.items()]
    address = f"http://127.0.0.1:{server.http}/v2/models/clip_text/infer"
    try:
        with urllib.request.urlopen(address, json.dumps({"inputs": inputs}).encode(), timeout=60) as answer:
            (output,) = json.load(answer)["outputs"]
    except urllib.error.HTTPError as error:
        return error.code, None
    return 200, np.reshape(output["data"], output["shape"]).tolist()


@pytest.mark.slow
def test_a_start_with_a_broken_version_ends_and_names_it(environment, repository, tmp_path):
    """Triton takes all of a model's versions at its start or none: a rollout stops, and the old pod goes on."""
    models = Path(shutil.copytree(repository / "python", tmp_path / "models"))
    broken = changed(repository / "python", tmp_path / "broken", spoil)
    assert publish(broken, models) == "2"
    with (
        pytest.raises(DeployError, match=r"Triton ended with code (1|-\d+)"),  # it may crash as it ends
        serve(models, environment, tmp_path / "server.log"),
    ):
        pass
    assert "failed to load 'clip_vision' version 2" in (tmp_path / "server.log").read_text(errors="replace")
    assert withdraw(models, "2") == "1"
    with serve(models, environment, tmp_path / "server.log") as server:
        assert server.is_ready()


SERVING = """
import sys, time
from pathlib import Path
from clip_deploy.serving.server import find_environment, serve
with serve(Path(sys.argv[1]), find_environment(Path(sys.argv[2])), Path(sys.argv[3])) as server:
    print(server.process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_server_no_model_and_no_memory(environment, repository, tmp_path):
    command = [sys.executable, "-c", SERVING, repository / "python", ENVIRONMENT, tmp_path / "server.log"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        group = int(process.stdout.readline())
        assert list(Path("/dev/shm").glob(f"clip_deploy_{process.pid}_*"))
        process.kill()
    assert gone(lambda: alive(group) or list(Path("/dev/shm").glob(f"clip_deploy_{process.pid}_*")))


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why_and_leaves_nothing_behind(environment, repository, tmp_path):
    shutil.copytree(repository / "python" / "clip_text", tmp_path / "models" / "clip_text")
    (tmp_path / "models" / "clip_text" / "1" / "onnx-fp32" / "text.onnx").write_bytes(b"broken")
    with (
        pytest.raises(DeployError, match=r"Triton ended with code 1: .*"),
        serve(tmp_path / "models", environment, tmp_path / "server.log"),
    ):
        pass
    assert not list(Path("/dev/shm").glob("clip_deploy_*"))


def gone(found, timeout_s=20.0):
    """Whether nothing is found any more, within a time."""
    end = time.monotonic() + timeout_s
    while found() and time.monotonic() < end:
        time.sleep(0.05)
    return not found()


def alive(group):
    """States of a group's processes, without those that only wait to be reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            found += [state] if int(its_group) == group and state != "Z" else []
    return found


GUARDED = """
import subprocess, sys, time
from pathlib import Path
from clip_deploy.serving import server
server.SHARED = Path(sys.argv[1])
guard = server.start_guard("clip_deploy_mine_")
model = subprocess.Popen(["sleep", "600"], start_new_session=True)
server.watch(guard, model)
print(model.pid, flush=True)
time.sleep(600)
"""


def test_a_guard_clears_up_behind_a_killed_run(tmp_path):
    for name in ("clip_deploy_mine_region", "clip_deploy_other_region"):
        (tmp_path / name).touch()
    with subprocess.Popen([sys.executable, "-c", GUARDED, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as process:
        group = int(process.stdout.readline())
        assert alive(group)
        process.kill()
    assert gone(lambda: alive(group) or (tmp_path / "clip_deploy_mine_region").exists())
    assert (tmp_path / "clip_deploy_other_region").exists()


def test_memory_of_a_run_that_was_killed_with_its_guard_is_freed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "SHARED", tmp_path)
    with subprocess.Popen(["true"]) as ended:
        pass
    regions = [f"clip_deploy_{pid}_8000_region" for pid in (ended.pid, os.getpid())]
    for region in regions:
        (tmp_path / region).touch()
    running.sweep()
    assert [path.name for path in tmp_path.iterdir()] == regions[1:]


def test_a_server_that_ignores_its_end_is_killed(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    guard = running.start_guard("clip_deploy_none_")
    running.watch(guard, process)
    stop(Server(0, 0, 0, process, tmp_path / "log", guard))
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_without_its_environment_the_check_is_unavailable_and_names_the_way_out(tmp_path):
    settings = TritonCheckConfig(environment=str(tmp_path / "none"))
    found = check_served(tmp_path, tmp_path, None, settings, seed=0)
    assert found.status == "unavailable"
    assert found.reasons[0].endswith("run `make triton-env`")


def pretend(folder, numpy):
    packages = folder / "lib" / "python3.11" / "site-packages"
    for name in ("nvidia_pytriton-0.7.0", f"numpy-{numpy}", "onnxruntime-1", "tokenizers-1", "pillow-1"):
        (packages / f"{name}.dist-info").mkdir(parents=True)
    (packages / "tritonclient-2.51.0.dist-info").mkdir()
    return folder


def test_a_numpy_with_which_the_server_answers_with_nothing_is_refused(tmp_path):
    with pytest.raises(UnavailableError, match=r"numpy 2\.1\.0, with which this server answers with empty outputs"):
        find_environment(pretend(tmp_path, "2.1.0"))
    assert versions(tmp_path)["nvidia_pytriton"] == "0.7.0"


def test_a_runtime_that_the_server_lacks_is_named_with_the_command_that_adds_it(tmp_path):
    folder = pretend(tmp_path, "1.26.4")
    check_runtimes(folder, ["onnxruntime==1"])
    with pytest.raises(
        UnavailableError, match=r"with openvino==2, which .* lacks: `.*/pip install --no-deps openvino==2"
    ):
        check_runtimes(folder, ["onnxruntime==1", "openvino==2"])


def test_ports_are_free_and_differ():
    ports = free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", port))


ROW = {"Inferences/Second": "100", "p50 latency": "5000", "p90 latency": "7000", "p99 latency": "9000"}


def test_a_percentile_is_stated_only_where_enough_calls_lie_beyond_it():
    assert summary(ROW, requests=600, rows=600, executions=200) == {
        "requests_per_s": 100.0,
        "p50_ms": 5.0,
        "p90_ms": 7.0,
        "p99_ms": 9.0,
        "mean_batch": 3.0,
    }
    assert set(summary(ROW, requests=60, rows=60, executions=60)) == {
        "requests_per_s",
        "p50_ms",
        "p90_ms",
        "mean_batch",
    }


STEP = VersionStep("back", ["1", "2"], "2", "", as_expected=True, right=True, sent=50, failed=0, error="")
FAULT = Fault("noise", "closed", refused=None, survived=True)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"parity": {"texts, grpc": parity(0.9)}}, "texts, grpc: lowest cosine"),
        ({"parity": {"texts, grpc": parity(float("nan"))}}, "texts, grpc: lowest cosine"),
        ({"parity": {"files": Agreement(2, 50.0, 0.1)}}, "50 % of the answers"),
        ({"faults": [replace(FAULT, survived=False)]}, "after noise the server was not as before"),
        ({"faults": [replace(FAULT, refused=False)]}, "noise was not refused as a client's mistake"),
        ({"versions": [replace(STEP, failed=2, error="closed")]}, "back: 2 requests failed (closed)"),
        ({"versions": [replace(STEP, sent=3)]}, "back: only 3 requests were sent"),
        ({"versions": [replace(STEP, right=False)]}, "back: an answer is not of the version that gave it"),
        ({"versions": [replace(STEP, as_expected=False)]}, "back: versions 1, 2 answer"),
        ({"health": {"/v2/health/ready": 400}}, "/v2/health/ready answers 400"),
        ({"drift": {"same": drift(True), "dark": drift(True)}}, "drift was found where there is none"),
        ({"drift": {"same": drift(False), "dark": drift(False)}}, "were not found to have drifted"),
    ],
)
def test_what_went_wrong_is_named(part, reason):
    assert check_answers(served().answers) == []
    (found,) = check_answers(served(**part).answers)
    assert reason in found


def test_the_second_version_gives_the_negated_embeddings(tmp_path):
    program = "class TritonPythonModel:\n    def encode(self, arrays):\n        return 3 + arrays\n"
    (tmp_path / "model.py").write_text(program)
    negate(tmp_path)
    second = runpy.run_path(str(tmp_path / "model.py"))["TritonPythonModel"]()
    assert second.encode(4) == -7


def test_settings_of_the_check_are_bounded():
    with pytest.raises(ConfigError, match=r"triton_check\.concurrency is \[0\]"):
        TritonCheckConfig(concurrency=[0])
    with pytest.raises(ConfigError, match=r"triton_check\.seconds is 600"):
        TritonCheckConfig(seconds=600)


def test_the_server_encodes_with_the_projects_own_versions():
    def pinned(name):
        lines = (ROOT / name).read_text().splitlines()
        return dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line)

    server, own = pinned("requirements-triton.txt"), pinned("requirements.lock")
    assert server["tokenizers"] == own["tokenizers"]
    assert server["pillow"] == own["pillow"]
    assert server["onnxruntime"] == own["onnxruntime"]
    assert server["openvino"] == own["openvino"]
    assert int(np.array(server["numpy"].split("."))[0]) < 2
