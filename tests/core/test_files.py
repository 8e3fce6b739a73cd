import os
import tempfile
import time
from pathlib import Path

import pytest

from clip_deploy.core.config import DataConfig, ModelConfig
from clip_deploy.core.environment import fingerprint, fingerprint_input
from clip_deploy.core.files import RACY_NS, own_folder, remembered


def put(folder, **contents):
    for name, content in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.fixture
def reads(monkeypatch):
    """Names of the files whose content is read."""
    from clip_deploy.core import files

    found, whole = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: found.append(path.name) or whole(path))
    return found


def hashed(memory, *paths):
    with remembered(memory) as hash_file:
        return [hash_file(path) for path in paths]


def test_only_what_changed_is_read_again(tmp_path, reads, monkeypatch):
    folder, memory = put(tmp_path / "folder", a="1", b="2"), tmp_path / "memory"
    a, b = folder / "a", folder / "b"
    assert hashed(memory, a, b) == hashed(memory, a, b)
    assert reads == ["a", "b", "a", "b"]  # just written: they may change again within a tick of the clock
    monkeypatch.setattr("clip_deploy.core.files.time.time_ns", lambda now=time.time_ns: now() + 2 * RACY_NS)
    first = hashed(memory, a, b)
    reads.clear()
    assert hashed(memory, a, b) == first
    assert reads == []
    before = a.stat()
    a.write_text("9")
    os.utime(a, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size, and as `cp -p` leaves it
    assert hashed(memory, a, b) == [hashed(tmp_path / "other", a)[0], first[1]]
    assert reads == ["a", "a"]


def test_local_inputs_are_read_once_and_known_by_their_content_alone(tmp_path, reads, monkeypatch):
    """A checkpoint, an image folder, and a table with its images, below one repository of DVC and another."""
    put(tmp_path / "model", **{"config.json": "1", "model.safetensors": "2", ".git__HEAD": "3"})
    put(tmp_path / "images", cat__a="1", cat__b="2")
    put(tmp_path, **{"captions.csv": "image,caption\nimages/cat/a,A\n"})
    inputs = [
        (tmp_path / "model", ModelConfig(path="x")),
        (tmp_path / "images", DataConfig(source="image-folder", path="x")),
        (tmp_path / "captions.csv", DataConfig(source="captions", path="x", caption_column="caption")),
    ]
    monkeypatch.setattr("clip_deploy.core.files.time.time_ns", lambda now=time.time_ns: now() + 2 * RACY_NS)
    found, read = [], []
    for repository in ("one", "one", "other", "none"):
        (tmp_path / repository).mkdir(exist_ok=True)
        if repository != "none":
            (tmp_path / repository / ".dvc" / "tmp").mkdir(exist_ok=True, parents=True)
        monkeypatch.chdir(tmp_path / repository)
        found.append([fingerprint_input(*given) for given in inputs])
        read.append(sorted(reads))
        reads.clear()
    files = ["a", "a", "b", "captions.csv", "config.json", "model.safetensors"]
    assert read == [files, [], files, files]
    assert found == [found[0]] * 4
    assert found[0][0] == fingerprint(tmp_path / "model", ["config.json", "model.safetensors"])
    assert os.listdir(tmp_path / "none") == []
    put(tmp_path / "images", cat__a="9")
    monkeypatch.chdir(tmp_path / "one")
    assert [fingerprint_input(*given) == was for given, was in zip(inputs, found[0], strict=True)] == [
        *(True, False, False)
    ]
    assert sorted(reads) == ["a", "a"]


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"0" * 64 + b"\n{}", "flip"])
def test_a_damaged_memory_costs_time_only(tmp_path, reads, monkeypatch, damage):
    monkeypatch.setattr("clip_deploy.core.files.time.time_ns", lambda now=time.time_ns: now() + 2 * RACY_NS)
    memory, path = tmp_path / "memory", put(tmp_path, a="1") / "a"
    first = hashed(memory, path)
    content = memory.read_bytes()
    memory.write_bytes(content.replace(first[0][:1].encode(), b"x") if damage == "flip" else damage)
    reads.clear()
    assert hashed(memory, path) == first
    assert reads == ["a"]
    assert memory.read_bytes() == content
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_a_memory_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_deploy.core.files.time.time_ns", lambda now=time.time_ns: now() + 2 * RACY_NS)
    path = put(tmp_path, a="1") / "a"
    assert hashed(tmp_path / "none" / "none" / "memory", path) == hashed(Path("/proc/memory"), path)
    assert os.listdir(tmp_path) == ["a"]


def test_only_folders_of_processes_that_ended_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("tmp/clip-deploy-job-killed/checkout", "tmp/clip-deploy-jobs", "mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tmp" / "clip-deploy-job-link").symlink_to(tmp_path / "mine")
    with own_folder("clip-deploy-job-") as first, own_folder("clip-deploy-job-") as second:
        left = {path.name for path in (tmp_path / "tmp").iterdir()}
        assert left == {first.name, second.name, "clip-deploy-jobs", "clip-deploy-job-link"}
        assert first != second
    assert (tmp_path / "mine").is_dir()
    assert {path.name for path in (tmp_path / "tmp").iterdir()} == {"clip-deploy-jobs", "clip-deploy-job-link"}
