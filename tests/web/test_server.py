import base64
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from support.fast_feed import need_fast_feed
from support.project import ROOT
from support.web import BROKEN, encoded, request, serving, vectors, wait_until

from clip_deploy.__main__ import main
from clip_deploy.core.errors import DataError
from clip_deploy.core.files import own_folder, sha256
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.web import libraries
from clip_deploy.web.keys import Keys, warn_if_readable
from clip_deploy.web.models import _no_package
from clip_deploy.web.server import METRICS, Announced
from clip_deploy.web.settings import Settings

READY = b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def classifier(package):
    return ZeroShotClassifier.open(package, threads=2)


def refused(*arguments):
    """The exit code and the error of a server that does not start."""
    command = [sys.executable, "-m", "clip_deploy", "serve", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def test_a_key_is_asked_for_wherever_one_is_given(package, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# of two clients\nfirst-key\n\n  second-key \n")
    keys.chmod(0o644)
    body = {"input": "a"}
    with serving(package, "--api-key-file", keys, "--allow-host", "proxy.example.com") as server:
        assert server.get("/health/live", host="proxy.example.com")[0] == 200
        assert server.get("/health/live", host="another.example.com")[0] == 421
        assert server.post("/v1/embeddings", body)[0] == 401
        for given in (
            "Bearer wrong",
            "Bearer",
            "Bearer #",
            "Bearer clients",
            "Basic first-key",
            "first-key",
            "Bearer é",
        ):
            status, found = server.post("/v1/embeddings", body, authorization=given.encode())
            assert (status, found["error"]["code"]) == (401, "invalid_api_key")
        for key in ("first-key", "second-key"):
            assert server.post("/v1/embeddings", body, authorization=f"Bearer {key}")[0] == 200
        for path, status in (("/v1/models", 401), ("/metrics", 401), ("/health/ready", 200), ("/docs", 200)):
            assert server.get(path)[0] == status
        assert server.get("/v1/models", authorization="Bearer first-key")[0] == 200
        numbers = server.get("/metrics", authorization="Bearer first-key")[2]
        assert 'clip_requests_total{route="/v1/models",status="401"} 1.0' in numbers
        assert server.stop() == 0
        assert server.process.stderr.read() == f"warning: {keys} holds keys, and others may read it: chmod 600 {keys}\n"


def test_a_file_without_keys_is_refused(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match="holds no key"):
        Keys(tmp_path / "empty")
    with pytest.raises(DataError, match="cannot be read"):
        Keys(tmp_path / "none")


@pytest.mark.parametrize("line", ["sk-3f9c1b7e  # alice", "sk-3f9c1b7e sk-a1b2c3d4", "1234567", "schl\u00fcssel-1"])
def test_a_line_that_is_no_key_is_named_and_not_shown(tmp_path, line):
    keys = tmp_path / "keys"
    keys.write_text(f"# alice\nsk-00000000\n{line}\n")
    with pytest.raises(DataError, match=r"keys: line 3 is not a key") as caught:
        Keys(keys)
    assert line not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "is_ours", "warned"),
    [
        (0o600, False, False),
        (0o440, True, False),
        (0o440, False, True),
        (0o444, True, True),
        (0o602, True, True),
    ],
)
def test_keys_may_be_read_by_the_servers_own_group_alone(tmp_path, monkeypatch, mode, is_ours, warned):
    (tmp_path / "keys").touch(mode)
    (tmp_path / "keys").chmod(mode)
    group = (tmp_path / "keys").stat().st_gid
    monkeypatch.setattr(os, "getegid", lambda: group + 1)
    monkeypatch.setattr(os, "getgroups", lambda: [group] if is_ours else [])
    with warnings.catch_warnings(record=True, action="always") as found:
        warn_if_readable(tmp_path / "keys")
    assert bool(found) == warned


def test_packages_are_chosen_by_name_and_version(package, classifier):
    name = classifier.package.origin.run.model
    with serving(package, f"other={package}", f"other:2={package}") as server:
        ids = [model["id"] for model in server.get("/v1/models")[2]["data"]]
        first, other, second = ids
        assert first == f"{name}:{classifier.fingerprint[:12]}"
        assert (other.partition(":")[0], second) == ("other", "other:2")
        for asked, answered in ((None, first), (name, first), ("other", other), ("other:2", second), (first, first)):
            status, found = server.post("/v1/embeddings", {"input": "a", "model": asked})
            assert (status, found["model"]) == (200, answered)
            assert np.abs(vectors([found["data"][0]["embedding"]]) - classifier.embed_texts(["a"])).max() < 1e-3
        assert server.post("/v1/embeddings", {"input": "a", "model": "other:3"})[0] == 404


def test_sigterm_lets_requests_finish_and_says_that_it_is_not_ready(package, classifier):
    with serving(package, drain_s="1") as server:
        content = request("/v1/embeddings", {"input": "a"})
        with server.send(content[:-1]) as running:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.get("/health/ready")[0] == 503)
            assert server.get("/health/live")[0] == 200
            status, headers, _ = server.ask(
                "POST", "/v1/embeddings", b'{"input": "b"}', {"content-type": "application/json"}
            )
            assert (status, headers["connection"]) == (200, "close")
            wait_until(lambda: not accepts(server))  # it was sent half a request, and still waits for the other half
            running.sendall(content[-1:])
            answer = b"".join(iter(lambda: running.recv(65_536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        found = vectors([json.loads(body)["data"][0]["embedding"]])
        assert np.abs(found - classifier.embed_texts(["a"])).max() < 1e-3
        assert server.process.wait(20) == 0
        assert server.process.stderr.read() == ""


def test_after_the_workers_stopped_to_accept_a_connection_is_refused(package):
    with serving(package, "--workers", 2, drain_s="0.5") as server:
        content = request("/v1/embeddings", {"input": "a"})
        with server.send(content[:-1]) as running:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_refused(server))
            running.sendall(content[-1:])
            assert running.recv(100).startswith(b"HTTP/1.1 200 ")
        assert server.process.wait(20) == 0
        assert server.process.stderr.read() == ""


def test_workers_drain_though_each_gets_the_signal_twice_and_a_second_one_hurries_them(package):
    """As from systemd, which sends SIGTERM to every process of a service."""
    with serving(package, "--workers", 2, drain_s="600") as server:
        for process in [*workers(server), server.process.pid]:
            os.kill(process, signal.SIGTERM)
        wait_until(lambda: server.get("/health/ready")[0] == 503)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(3)
        assert server.post("/v1/embeddings", {"input": "a"})[0] == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert server.process.stderr.read() == ""


def is_refused(server):
    try:
        socket.create_connection((server.host, int(server.port))).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_server_says_where_it_is_once_it_answers():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))

        def announce():
            assert not is_refused(SimpleNamespace(host="127.0.0.1", port=listening.getsockname()[1]))
            running.should_exit = True

        running = Announced(uvicorn.Config(Starlette(), log_level="warning"), announce)
        running.run([listening])
    assert running.should_exit


EARLY = """
import signal, socket
from types import SimpleNamespace
import uvicorn
from clip_deploy.web.app import App
from clip_deploy.web.server import _run
from clip_deploy.web.settings import Settings

run = uvicorn.Server.run

def late(server, sockets):
    signal.raise_signal(signal.SIGTERM)
    run(server, sockets)

uvicorn.Server.run = late
app = App()
app.posts, app.metrics = {}, {}
app.state.api = SimpleNamespace(models=SimpleNamespace(served=[]), searched=None)
with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    _run(Settings(), app, listening, lambda served: print("told", flush=True))
print("ended")
"""


def test_a_signal_that_comes_before_the_server_runs_is_not_lost():
    """In a process of its own, which the signal may end."""
    done = subprocess.run([sys.executable, "-c", EARLY], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "told\nended\n", "")


def accepts(server):
    try:
        return server.is_ready() or server.get("/health/live")[0] == 200
    except BROKEN:
        return False


@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_ends_it(package, count):
    """A terminal sends it to all processes of the server."""
    with serving(package, "--workers", count, drain_s="5") as server:
        each = [server.process.pid, *(workers(server) if count > 1 else ())]
        for process in each:
            os.kill(process, signal.SIGINT)
        assert server.process.wait(20) == 130
        assert server.process.stderr.read() == "stopped\n"


def test_workers_share_a_port_one_that_dies_is_replaced_and_all_end_with_their_parent(
    package, classifier, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a parent that is killed leaves the workers' numbers there for a time
    with serving(package, "--workers", 2) as server:
        expected = classifier.embed_images([Image.new("RGB", (50, 50), "red")])
        item = {"image": encoded(Image.new("RGB", (50, 50), "red"), "PNG")}
        wait_until(lambda: server.get("/metrics")[2].count("clip_model_info{") == 1)
        for _ in range(20):
            assert np.abs(server.embed(input=[item]) - expected).max() < 1e-3
        assert server.metric('clip_requests_total{route="/v1/embeddings",status="200"}') == 20
        name = classifier.package.origin.run.model
        assert re.fullmatch(rf"serving {name}:\w+ \(.*\) with 2 workers at {server.url}\n", server.said)
        before = workers(server)
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: len(after := workers(server)) == 2 and before[0] not in after)
        wait_until(lambda: answers(server, item, expected))
        assert server.metric('clip_requests_total{route="/v1/embeddings",status="200"}') > 20
        server.process.kill()
        wait_until(lambda: not accepts(server))  # nothing outlives a parent that was killed
    assert len(list(tmp_path.glob(f"{METRICS}*"))) == 1
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with own_folder(METRICS):
        assert len(list(tmp_path.glob(f"{METRICS}*"))) == 1  # the next server removes it


def answers(server, item, expected):
    try:
        return np.abs(server.embed(input=[item]) - expected).max() < 1e-3
    except BROKEN:  # the worker died that had accepted
        return False


def workers(server):
    """Processes that serve."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(server.process.pid)], capture_output=True, text=True, check=True
    )
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "spawn_main" in line]


def test_a_worker_that_cannot_open_its_package_ends_the_server(package):
    code, said = refused(package, "--workers", 2, "--port", 0, "--device", "tpu")
    assert code == 1
    assert "error: device is 'tpu': accepted are cpu, cuda" in said


def test_a_worker_that_would_answer_otherwise_than_the_first_ends_the_server(package, tmp_path):
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    with serving(f"prod:1={folder}", "--workers", 2) as server:
        repackage(folder)
        os.kill(workers(server)[0], signal.SIGKILL)
        assert server.process.wait(60) == 1
        said = server.process.stderr.read()
        assert "warning: a worker crashed with SIGKILL" in said
        assert "error: a package or the index has changed since the server started" in said
        assert "Traceback" not in said


def repackage(folder):
    """Other classes, with the manifest that belongs to them."""
    labels, manifest = folder / "labels.json", folder / "manifest.json"
    labels.write_text(labels.read_text().replace("green", "olive"))
    content = json.loads(manifest.read_text())
    content["files"]["labels.json"] = {"sha256": sha256(labels), "bytes": labels.stat().st_size}
    manifest.write_text(json.dumps(content))


def test_workers_keep_the_keys_with_which_the_server_started(package, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\n")
    keys.chmod(0o600)
    with serving(package, "--workers", 2, "--api-key-file", keys) as server:
        keys.write_text("second-key\n")
        before = workers(server)
        for process in before:
            os.kill(process, signal.SIGKILL)
        wait_until(lambda: len(after := workers(server)) == 2 and not set(before) & set(after))
        bearer = {"authorization": "Bearer first-key"}
        wait_until(lambda: server.is_ready())
        assert server.post("/v1/embeddings", {"input": "a"}, **bearer)[0] == 200


def test_workers_that_end_before_they_answer_end_the_server(package, tmp_path):
    """As with a full disk, which ends what writes into a file that is mapped into memory."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if '--multiprocessing-fork' in sys.orig_argv:\n"
        "    os.kill(os.getpid(), signal.SIGBUS)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "clip_deploy", "serve", str(package), "--port", "0", "--workers", "2"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (1, "")
    said = "error: a worker crashed with SIGBUS before it answered"
    assert f"{said} ({tmp_path} may be full: TMPDIR names another folder)" in done.stderr


@pytest.mark.parametrize("count", [1, 2])
def test_another_servers_folder_of_numbers_is_left_alone(package, tmp_path, monkeypatch, count):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "others"))
    with serving(package, "--workers", count) as server:
        server.embed(input="a")
        assert server.metric('clip_requests_total{route="/v1/embeddings",status="200"}') == 1
    assert list(tmp_path.iterdir()) == []


def test_it_is_ready_soon(package):
    """Not how soon: no test asserts a time. It says so once it is."""
    start = time.perf_counter()
    with serving(package) as server:
        print(f"ready after {time.perf_counter() - start:.2f} s")
        with server.send(READY) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is not a package"),
        (["a=nowhere"], "nowhere is not a package"),
        (["=nowhere"], "'=nowhere' names no package: give FOLDER, NAME=FOLDER or NAME:VERSION=FOLDER"),
        (["a:=nowhere"], "'a:=nowhere' names no package"),
        (["a:1:2=nowhere"], "'a:1:2=nowhere' names no package"),
        (["a="], "'a=' names no package"),
        (["--max-items", "0"], "--max-items is 0: give 1 or more"),
        (["--port", "65536"], "--port is 65536: give 0 to 65,535"),
        (["--workers", "2000"], "--workers is 2000: give 1 to 1,024"),
        (["--host", "x..y"], "cannot listen at x..y port 0"),
        (["--allow-host", "http://x/"], "--allow-host 'http://x/' is not a host name"),
        (["--allow-image-host", "https://x.com/"], "--allow-image-host 'https://x.com/' is not a host name"),
        (["--allow-image-host", "x.com:443"], "--allow-image-host 'x.com:443' is not a host name"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere cannot be read"),
    ],
)
def test_settings_that_will_not_do_are_named(package, arguments, said):
    code, error = refused("--port", 0, *arguments)
    assert code == 1
    assert f"error: {said}" in error


FLOATS = [name for name, value in vars(Settings()).items() if isinstance(value, float | int)]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_taken_that_is_not_finite(name, value):
    with pytest.raises(DataError, match=f"--{name.replace('_', '-')} is {value}: give ") as refused:
        Settings(**{name: value})
    assert value != math.inf or re.search(" to [0-9]| and no infinity$", str(refused.value))


def test_folders_of_the_pipeline_that_are_no_package_are_called_what_they_are(tmp_path):
    (tmp_path / "ort-fp16").mkdir()
    (tmp_path / "ort-fp16" / "target.json").write_text("{}")
    (tmp_path / "triton" / "python" / "clip_vision").mkdir(parents=True)
    (tmp_path / "triton" / "python" / "clip_vision" / "config.pbtxt").write_text("")
    assert "clip-deploy package ort-fp16 --output" in _no_package(tmp_path / "ort-fp16")
    for folder in (tmp_path / "triton", tmp_path / "triton" / "python"):
        assert "a model repository for Triton" in _no_package(folder)
    assert _no_package(tmp_path) is None


def test_a_port_that_is_taken_is_named(package):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = refused(package, "--port", port)
    assert code == 1
    assert f"cannot listen at 127.0.0.1 port {port} (Address already in use)" in error


def test_an_open_address_without_keys_is_warned_of(package):
    with serving(package, "--host", "0.0.0.0") as server:
        assert server.get("/health/live", host="any.example.com")[0] == 200
        assert server.stop() == 0
        assert "warning: --host 0.0.0.0 lets everyone who reaches this machine use" in server.process.stderr.read()


def test_the_fast_feed_gives_the_fast_feeds_embeddings(package, tmp_path):
    need_fast_feed()
    photo = Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 50).convert("RGB")
    photo.save(tmp_path / "photo.jpg")
    opened = [ZeroShotClassifier.open(package, threads=2, feed=feed) for feed in ("fast", "exact")]
    fast, exact = (each.embed_images([tmp_path / "photo.jpg"]) for each in opened)
    assert np.abs(fast - exact).max() > 1e-4
    with serving(package, "--feed", "fast") as server:
        found = server.embed(input=[{"image": base64.b64encode((tmp_path / "photo.jpg").read_bytes()).decode()}])
    assert np.abs(found - fast).max() < 1e-5


def test_a_library_of_the_extra_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == "error: serve needs uvicorn: pip install 'clip-deploy[serve]'\n"


def test_the_default_is_this_machine_alone():
    assert Settings().host == "127.0.0.1"
