"""Whoever chooses first decides for all processes, and a folder that cannot be written stops nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clip_deploy.runtimes.choices import FOLDER, Choices


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_first_choice_holds_for_all_who_come_later():
    assert Choices("H200", "torch 2").get("linear") is None
    assert Choices("H200", "torch 2").settle("linear", 3) == 3
    assert Choices("H200", "torch 2").settle("linear", 1) == 3
    assert Choices("H200", "torch 2").get("linear") == 3
    assert Choices("H100", "torch 2").get("linear") is None
    assert Choices("H200torch", " 2").get("linear") is None


def test_of_many_processes_that_choose_at_once_all_take_one(cache):
    begin = "import sys; from clip_deploy.runtimes.choices import Choices"
    code = f"{begin}; print(Choices('a').settle('b', int(sys.argv[1])))"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    found = {each.communicate()[0].strip() for each in running}
    assert len(found) == 1
    assert str(Choices("a").get("b")) in found
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [""]  # nothing is left half-written


def test_a_folder_that_cannot_be_written_or_a_file_that_is_none_costs_nothing_but_time(cache, monkeypatch):
    found = Choices("a")
    found.settle("b", 2)
    (path,) = (each for each in cache.rglob("*") if each.is_file())
    path.write_text("two")
    assert found.get("b") is None
    assert found.settle("b", 1) == 1
    cache.parent.joinpath("file").write_text("")
    monkeypatch.setenv(FOLDER, str(cache.parent / "file"))
    assert Choices("a").settle("b", 1) == 1
    assert Choices("a").get("b") is None


def test_without_the_variable_it_lies_where_the_system_keeps_such_things(monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Choices("a").folder.is_relative_to(tmp_path / "clip-deploy")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Choices("a").folder.is_relative_to(Path(os.path.expanduser("~/.cache/clip-deploy")))
