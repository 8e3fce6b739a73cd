"""A real Triton server, where `make triton-env` made its environment; without it these tests are skipped."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from clip_deploy.core.config import TritonCheckConfig, TritonConfig
from clip_deploy.core.errors import ConfigError, DeployError, UnavailableError
from clip_deploy.prepared import load_prepared
from clip_deploy.serving import server as running
from clip_deploy.serving.check import check_served, judge
from clip_deploy.serving.load import summary
from clip_deploy.serving.repository import write_repository
from clip_deploy.serving.server import Server, find_environment, free_ports, serve, stop, versions

TRITON = ROOT / "build" / "triton-venv"
SETTINGS = TritonCheckConfig(environment=str(TRITON), concurrency=[2], seconds=0.5)


@pytest.fixture(scope="module")
def environment():
    try:
        return find_environment(TRITON)
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
    assert record["status"] == "pass", record["reasons"]
    for name in ("images, http", "images, grpc", "texts, http", "texts, grpc"):
        assert record["parity"][name]["cosine_min"] > 0.999999
    for name in ("probabilities, http", "probabilities, grpc"):
        assert record["parity"][name]["same_answer_percent"] == 100
        assert record["parity"][name]["max_abs_diff"] < 1e-3
    assert set(record["health"].values()) == {200}


@pytest.mark.slow
def test_a_second_version_comes_and_goes_and_a_broken_one_is_refused_under_traffic(record):
    second, broken, back = record["versions"]
    assert (second["ready"], second["answers"], second["refused"]) == (["1", "2"], "2", "")
    assert (broken["ready"], broken["answers"]) == (["1", "2"], "2")
    assert "load failed" in broken["refused"]
    assert (back["ready"], back["answers"]) == (["1"], "1")
    assert [step["failed"] for step in record["versions"]] == [0, 0, 0]
    assert back["sent"] > 0


@pytest.mark.slow
def test_the_server_survives_what_no_client_should_send(record):
    answers = {fault["fault"]: fault["answer"] for fault in record["faults"]}
    assert all(fault["survived"] for fault in record["faults"])
    assert answers["a model that is not there"].startswith("404")
    assert "batch-size must be <= 32" in answers["a batch of one more than accepted"]
    assert "30000 x 30000 pixels" in answers["an image of 900 million pixels"]
    assert "at most 20000000 are accepted" in answers["an image file of 25 MB"]
    assert "cannot encode this request" in answers["token ids beyond the vocabulary"]
    assert answers["a client killed while four requests run"] == "killed"


@pytest.mark.slow
def test_every_metric_of_the_dashboard_is_one_that_the_server_exposes(record, repository):
    dashboard = json.loads((repository / "deploy" / "grafana-dashboard.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    named = set(re.findall(r"\bnv_\w+", queries))
    assert len(named) >= 12
    assert named <= set(record["metrics"])


@pytest.mark.slow
def test_load_is_measured_for_both_towers_the_cache_and_the_ensemble(record):
    measured = [(row["model"], row["protocol"], row["note"]) for row in record["load"]]
    assert measured == [
        ("clip_vision", "http", "one image"),
        ("clip_vision", "grpc", "one image"),
        ("clip_text", "grpc", "one text, cached"),
        ("clip_zero_shot", "grpc", "one image file, 8 texts"),
        ("clip_text", "grpc", "one text"),
    ]
    assert all(row["requests_per_s"] > 0 and len(row["windows_per_s"]) == 3 for row in record["load"])
    cached, fresh = record["load"][2], record["load"][4]
    assert "mean_batch" not in cached
    assert fresh["mean_batch"] >= 1


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why_and_leaves_nothing_behind(environment, repository, tmp_path):
    shutil.copytree(repository / "python" / "clip_text", tmp_path / "models" / "clip_text")
    (tmp_path / "models" / "clip_text" / "1" / "model.onnx").write_bytes(b"broken")
    with (
        pytest.raises(DeployError, match=r"Triton ended with code 1: .*"),
        serve(tmp_path / "models", environment, tmp_path / "server.log"),
    ):
        pass
    assert not list(Path("/dev/shm").glob("clip_deploy_*"))


def test_a_server_that_ignores_its_end_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(running, "STOP_S", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    stop(Server(0, 0, 0, process, tmp_path / "log"))
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_without_its_environment_the_check_is_unavailable_and_names_the_way_out(tmp_path):
    settings = TritonCheckConfig(environment=str(tmp_path / "none"))
    found = check_served(tmp_path, tmp_path, None, settings, seed=0)
    assert found["status"] == "unavailable"
    assert found["reasons"][0].endswith("run `make triton-env`")


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


def test_ports_are_free_and_differ():
    assert len(set(free_ports(3))) == 3


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


def test_rows_that_the_cache_answered_say_nothing_of_batches():
    assert "mean_batch" not in summary(ROW, requests=600, rows=16, executions=16)


WRONG = {"step": "back", "failed": 0, "same": True, "as_expected": False, "ready": ["1", "2"]}
GOOD = {
    "parity": {"images, http": {"cosine_min": 1.0}},
    "faults": [],
    "versions": [],
    "health": {"/v2/health/live": 200},
    "drift": {"same": {"drifted": False}, "dark": {"drifted": True}},
}


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"parity": {"texts, grpc": {"cosine_min": 0.9}}}, "texts, grpc: lowest cosine"),
        ({"parity": {"texts, grpc": {"cosine_min": float("nan")}}}, "texts, grpc: lowest cosine"),
        ({"parity": {"files": {"same_answer_percent": 50.0}}}, "50 % of the answers"),
        ({"faults": [{"fault": "noise", "survived": False}]}, "after noise the server was not as before"),
        ({"versions": [{"step": "back", "failed": 2, "same": True, "as_expected": True}]}, "back: 2 requests failed"),
        (
            {"versions": [{"step": "back", "failed": 0, "same": False, "as_expected": True}]},
            "back: the versions answer differently",
        ),
        ({"versions": [WRONG]}, "back: versions 1, 2 answer"),
        ({"health": {"/v2/health/ready": 400}}, "/v2/health/ready answers 400"),
        ({"drift": {"same": {"drifted": True}, "dark": {"drifted": True}}}, "drift was found where there is none"),
        ({"drift": {"same": {"drifted": False}, "dark": {"drifted": False}}}, "were not found to have drifted"),
    ],
)
def test_what_went_wrong_is_named(part, reason):
    assert judge(GOOD) == []
    (found,) = judge({**GOOD, **part})
    assert reason in found


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
    assert int(np.array(server["numpy"].split("."))[0]) < 2
