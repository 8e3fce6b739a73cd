"""Whose turn it is on this machine: builds may run side by side, what is timed runs alone.

Several `dvc repro`, or the workers of `dvc queue start`, would otherwise time each other's work. A lock of the kernel
ends with its process, however that ends. It is shared by all processes that have one temporary directory.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where each waits for nothing
    fcntl = None  # type: ignore[assignment]

DOOR, ROOM = "clip-deploy-door.lock", "clip-deploy-room.lock"


@contextmanager
def turn(alone: bool, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the machine, by oneself or with others who share it; `waits` is called where that takes time.

    Who wants to be alone holds the door until the room is empty, so that others who come later wait behind.
    """
    if fcntl is None:
        yield
        return
    door, room = _opened(DOOR), _opened(ROOM)
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    try:
        if not (_taken(door, fcntl.LOCK_EX) and _taken(room, kind)):
            waits()
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, kind)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
    finally:
        os.close(door)
        os.close(room)


def _taken(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _opened(name: str) -> int:
    """A descriptor of a file that all users of the machine may lock, whoever made it and with whatever umask."""
    folder = Path(tempfile.gettempdir())
    with suppress(FileExistsError):
        made = os.open(folder / name, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.fchmod(made, 0o666)
        return made
    try:
        return os.open(folder / name, os.O_RDONLY)  # without O_CREAT, which Linux refuses for another user's file there
    except PermissionError:  # made by another program's hand: this user's own processes still wait for one another
        return os.open(folder / f"{os.getuid()}-{name}", os.O_RDONLY | os.O_CREAT, 0o666)
