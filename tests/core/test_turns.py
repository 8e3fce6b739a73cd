import multiprocessing
import os
import signal
import tempfile

import pytest

from clip_deploy.core.turns import DOOR, ROOM, turn

WAIT_S = 60


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Of locks that no stage of another test holds."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def hold(alone, pipe):
    """Say "waits" where it must, "in" once it holds the machine, and leave when it is told to."""
    with turn(alone, lambda: pipe.send("waits")):
        pipe.send("in")
        pipe.recv()


class Holder:
    def __init__(self, alone):
        self.pipe, end = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=hold, args=(alone, end), daemon=True)
        self.process.start()
        end.close()

    def says(self):
        assert self.pipe.poll(WAIT_S)
        return self.pipe.recv()

    def leaves(self):
        self.pipe.send(None)
        self.process.join(WAIT_S)

    def is_silent(self):
        return not self.pipe.poll(0.2)


def test_builds_run_side_by_side():
    one, other = Holder(alone=False), Holder(alone=False)
    assert (one.says(), other.says()) == ("in", "in")
    one.leaves()
    other.leaves()


def test_what_is_timed_waits_for_all_builds_and_later_ones_wait_behind_it():
    one, other = Holder(alone=False), Holder(alone=False)
    assert (one.says(), other.says()) == ("in", "in")
    timed = Holder(alone=True)
    assert timed.says() == "waits"
    late = Holder(alone=False)
    assert late.says() == "waits"
    one.leaves()
    assert timed.is_silent()
    other.leaves()
    assert timed.says() == "in"
    assert late.is_silent()
    timed.leaves()
    assert late.says() == "in"
    late.leaves()


def test_two_are_never_timed_at_once():
    one = Holder(alone=True)
    assert one.says() == "in"
    other = Holder(alone=True)
    assert other.says() == "waits"
    assert other.is_silent()
    one.leaves()
    assert other.says() == "in"
    other.leaves()


def test_a_killed_process_gives_its_turn_up():
    one = Holder(alone=True)
    assert one.says() == "in"
    os.kill(one.process.pid, signal.SIGKILL)
    one.process.join(WAIT_S)
    other = Holder(alone=True)
    assert other.says() == "in"
    other.leaves()


def test_an_error_gives_the_turn_up():
    with pytest.raises(ValueError, match="of the stage"), turn(alone=True):
        raise ValueError("of the stage")
    other = Holder(alone=True)
    assert other.says() == "in"
    other.leaves()


def test_a_lock_is_for_all_users_whatever_the_umask(folder):
    before = os.umask(0o077)
    try:
        with turn(alone=True):
            pass
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys((DOOR, ROOM), 0o666)


def refusing(monkeypatch, refuse):
    """os.open as the system answers another user's file."""
    opened = os.open

    def refused(path, flags, *mode):
        if refuse(os.path.basename(path), flags):
            raise PermissionError
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refused)


def test_files_that_another_user_made_are_locked_all_the_same(folder, monkeypatch):
    (folder / DOOR).touch()
    created = os.O_CREAT  # as Linux does with fs.protected_regular
    refusing(monkeypatch, lambda name, flags: name == DOOR and flags & created and not flags & os.O_EXCL)
    with turn(alone=True):
        assert {path.name for path in folder.iterdir()} == {DOOR, ROOM}


def test_a_lock_that_another_user_keeps_for_himself_is_replaced_by_an_own_one(folder, monkeypatch):
    (folder / DOOR).touch()
    refusing(monkeypatch, lambda name, flags: name == DOOR and not flags & os.O_EXCL)
    with turn(alone=True):
        assert {path.name for path in folder.iterdir()} == {DOOR, ROOM, f"{os.getuid()}-{DOOR}"}
