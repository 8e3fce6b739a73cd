"""A served repository gets versions and loses them. The server is a stand-in: test_triton_server.py has a real one."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from clip_deploy.__main__ import main
from clip_deploy.core.artifact import hashes
from clip_deploy.core.config import TritonConfig
from clip_deploy.core.errors import DeployError
from clip_deploy.serving.publish import PARTS, WHOLE, publish, versions, withdraw
from clip_deploy.serving.repository import write_repository

VISION = "onnx-fp32/vision.onnx"  # in a version of the image tower


@pytest.fixture(scope="module")
def written(package, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "triton"
    write_repository(package, folder / "no-benchmark", TritonConfig(), folder)
    return folder


@pytest.fixture
def new(written, tmp_path):
    return shutil.copytree(written, tmp_path / "new") / "python"


@pytest.fixture
def served(written, tmp_path):
    return shutil.copytree(written / "python", tmp_path / "served")


@pytest.fixture
def server(served):
    """Notes which model is loaded, and which version clip_zero_shot names then; refuses the models in `refused`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            model = self.path.split("/")[-2]
            listening.loaded.append((model, *sorted(pinned(served))))
            body = json.dumps({"error": f"load failed for model '{model}'"}).encode()
            self.send_response(400 if model in listening.refused else 200)
            self.end_headers()
            self.wfile.write(body if model in listening.refused else b"")

        def log_message(self, *_):
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    listening.loaded, listening.refused = [], []
    listening.url = f"http://127.0.0.1:{listening.server_port}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


def pinned(served):
    return set(re.findall(r"model_version: (\S+)", (served / WHOLE / "config.pbtxt").read_text()))


def renew(new):
    """The manifest of a repository that was changed on purpose."""
    (new.parent / "manifest.json").write_text(
        json.dumps({"files": {name: facts for name, facts in hashes(new.parent).items() if name != "manifest.json"}})
    )


def test_a_version_is_added_beside_the_others_and_the_ensemble_names_it(new, served):
    (new / "clip_vision" / "1" / VISION).write_bytes(b"another")
    batching = (new / "clip_vision" / "config.pbtxt").read_text().replace("_microseconds: 200", "_microseconds: 300")
    (new / "clip_vision" / "config.pbtxt").write_text(batching)
    renew(new)
    old = (served / "clip_vision" / "1" / VISION).read_bytes()
    assert publish(new, served) == "2"
    assert publish(new, served) == "3"
    assert versions(served) == ["1", "2", "3"]
    assert pinned(served) == {"3"}
    for model in (*PARTS, WHOLE):
        assert sorted(path.name for path in (served / model).iterdir() if path.is_dir()) == [
            "1",
            "2",
            "3",
            *(["warmup"] if model == "clip_text" else []),
        ]
    assert (served / "clip_vision" / "1" / VISION).read_bytes() == old
    assert (served / "clip_vision" / "3" / VISION).read_bytes() == b"another"
    assert (served / "clip_vision" / "config.pbtxt").read_text() == batching


def test_a_configuration_that_stays_is_not_written_again(new, served):
    """With a newer one, Triton loads all versions of the model again."""
    configs = [served / model / "config.pbtxt" for model in PARTS]
    before = [config.stat().st_mtime_ns for config in configs]
    publish(new, served)
    assert [config.stat().st_mtime_ns for config in configs] == before


def test_parts_are_loaded_before_the_ensemble_that_names_them_and_leave_after_it(new, served, server):
    publish(new, served, server.url)
    assert server.loaded == [*((part, "1") for part in PARTS), (WHOLE, "2")]
    server.loaded.clear()
    assert withdraw(served, "2", server.url) == "1"
    assert server.loaded == [(WHOLE, "1"), *((part, "1") for part in PARTS)]
    assert versions(served) == ["1"]


@pytest.mark.parametrize("model", ["clip_text", WHOLE])
def test_a_version_that_the_server_refuses_leaves_everything_as_it_was(new, served, server, model):
    before, server.refused = hashes(served), [model]
    with pytest.raises(DeployError, match=f"the server refuses {model}: load failed for model '{model}'"):
        publish(new, served, server.url)
    assert hashes(served) == before
    assert {loaded for loaded, _ in server.loaded[-6:]} == {*PARTS, WHOLE}  # the server, too, looks again


def test_an_older_version_leaves_the_newest_in_service(new, served):
    publish(new, served)
    assert withdraw(served, "1") == "2"
    assert pinned(served) == {"2"}


def test_a_version_that_the_server_does_not_take_out_stays(new, served, server):
    publish(new, served)
    before, server.refused = hashes(served), [WHOLE]
    with pytest.raises(DeployError, match=f"the server refuses {WHOLE}"):
        withdraw(served, "2", server.url)
    with pytest.raises(DeployError, match=r"no server answers at http://127\.0\.0\.1:1 "):
        withdraw(served, "2", "http://127.0.0.1:1")
    assert hashes(served) == before
    assert [path for path in served.rglob("*") if path.name.startswith(".")] == []
    server.refused = []
    assert withdraw(served, "2", server.url) == "1"


def test_a_repository_is_not_published_into_itself(new, served):
    before = hashes(new)
    with pytest.raises(DeployError, match="is the repository itself, which the pipeline made: give a copy"):
        publish(new, new.parent / "." / new.name)
    assert hashes(new) == before


@pytest.mark.parametrize("version", ["7", "1"])
def test_a_version_that_is_not_there_or_the_last_one_stays(served, version):
    with pytest.raises(DeployError, match=f"has version 1: {version} cannot be taken out of it"):
        withdraw(served, version)
    assert versions(served) == ["1"]


def test_a_model_of_other_tensors_cannot_be_a_version(new, served):
    config = new / "clip_vision" / "config.pbtxt"
    config.write_text(config.read_text().replace("[3, 48, 48]", "[3, 64, 64]"))
    renew(new)
    with pytest.raises(DeployError, match=r"clip_vision of .* has another backend or other tensors"):
        publish(new, served)
    assert versions(served) == ["1"]


def test_a_repository_of_another_backend_cannot_be_a_version(written, served):
    with pytest.raises(DeployError, match="has another backend or other tensors"):
        publish(written / "onnxruntime", served)


def test_a_damaged_repository_is_refused(new, served):
    (new / "clip_text" / "1" / "onnx-fp32" / "text.onnx").write_bytes(b"damaged")
    with pytest.raises(DeployError, match=r"clip_text/1/onnx-fp32/text\.onnx: changed"):
        publish(new, served)


@pytest.mark.parametrize("content", ["[]", '{"files": {"a": 3}}'])
def test_a_repository_whose_manifest_names_no_files_is_refused(new, served, content):
    (new.parent / "manifest.json").write_text(content)
    with pytest.raises(DeployError, match=r"manifest\.json names no files; make it again with `dvc repro`"):
        publish(new, served)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none", "served"], "none does not exist: give artifacts/triton/onnxruntime or artifacts/triton/python"),
        (["note.txt", "served"], "note.txt is a file: give artifacts/triton/onnxruntime or artifacts/triton/python"),
        (["served", "served"], "served has no manifest.json beside it: give artifacts/triton/onnxruntime or"),
        (["https://a.b/c", "served"], "https://a.b/c is an address: give a path on this machine"),
        (["new/python", "none"], "none does not exist: give a copy of artifacts/triton/onnxruntime or"),
        (["new/python", "note.txt"], "note.txt is a file: give a copy of artifacts/triton/onnxruntime or"),
        (
            ["new/python", "served", "localhost:8000"],
            "the server's address is localhost:8000: give it in full, for example http://",
        ),
        (["--withdraw", "two", "served"], "served has version 1: two cannot be taken out of it"),
    ],
)
def test_a_wrong_word_is_named_with_what_is_right(new, served, words, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "note.txt").write_text("no repository")
    monkeypatch.chdir(tmp_path)
    before = hashes(served)
    assert main(["publish", *words]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {said}")
    assert errors.count("\n") == 1
    assert hashes(served) == before


def test_by_hand(new, served, server, tmp_path, capsys):
    assert main(["publish", str(new), str(served)]) == 0
    assert capsys.readouterr().out == f"{served}: version 2 is the newest; a server takes it at its next start\n"
    assert main(["publish", "--withdraw", "2", str(served), server.url + "/"]) == 0
    assert capsys.readouterr().out == f"{served}: version 1 is the newest\n"
    assert main(["publish", str(new), str(tmp_path)]) == 1
    assert "give a copy of artifacts/triton/onnxruntime" in capsys.readouterr().err
    assert main(["publish", str(new), str(served), "http://127.0.0.1:9"]) == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
