"""Processes that read files say of each what is said of it here, whatever becomes of them."""

import gc
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.fast_feed import need_fast_feed

from clip_deploy.core.jpeg import whole_jpeg
from clip_deploy.data import scenes
from clip_deploy.inference import file_reader
from clip_deploy.inference.file_reader import FileReader, FileReaders


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """JPEGs, a PNG, a JPEG without its end, an empty file, a folder, and a name that leads nowhere."""
    need_fast_feed()
    folder = tmp_path_factory.mktemp("files")
    for index in range(9):
        scenes.render("file reader", index, index)[0].save(folder / f"{index}.jpg", quality=90 - index)
    scenes.render("file reader", 9, 9)[0].save(folder / "9.png")
    (folder / "torn.jpg").write_bytes((folder / "0.jpg").read_bytes()[:500])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "folder.jpg").mkdir()
    os.symlink(folder / "0.jpg", folder / "é \n.jpg")
    return [*sorted(folder.iterdir()), folder / "gone.jpg"]


def expected(path):
    return whole_jpeg(path.read_bytes()) if path.is_file() else None


def assert_read(found, paths):
    assert len(found) == len(paths)
    for jpeg, path in zip(found, paths, strict=True):
        exact = expected(path)
        assert (jpeg is None) == (exact is None), path
        if jpeg:
            assert (bytes(jpeg.content), jpeg.header) == exact, path


def readers():
    """The numbers of this process's readers."""
    lists = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    children = {int(number) for path in lists for number in path.read_text().split()}
    return {number for number in children if "file_reader" in Path(f"/proc/{number}/cmdline").read_text()}


def begun(files):
    """A reader that has read, and its process's number."""
    before, reader = readers(), FileReader()
    assert_read(reader([str(path) for path in files]), files)
    (process,) = readers() - before
    return reader, process


def test_files_are_read_by_processes_for_many_threads(files, monkeypatch):
    monkeypatch.setattr(file_reader, "cores", lambda: 8)
    monkeypatch.setattr(file_reader, "_read", None)  # not here
    read = FileReaders()
    with ThreadPoolExecutor(5) as pool:
        for found in pool.map(read, [files] * 12):
            assert_read(found, files)
    assert_read(read([]), [])
    assert_read(read([str(path) for path in files]), files)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_where_a_process_is_killed_files_are_read_here(files):
    reader, process = begun(files)
    os.kill(process, signal.SIGKILL)
    for _ in range(2):
        assert_read(reader([str(path) for path in files]), files)
    assert reader.is_gone


def test_where_no_process_begins_files_are_read_here(files, monkeypatch, capfd):
    monkeypatch.setattr(file_reader.sys, "executable", "/bin/false")
    reader = FileReader()
    assert_read(reader([str(path) for path in files]), files)
    assert reader.is_gone
    monkeypatch.setattr(file_reader.sys, "executable", "/no/such/python")
    assert_read(FileReader()([str(path) for path in files]), files)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_process_ends_with_its_reader(files):
    reader, process = begun(files)
    del reader
    gc.collect()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
