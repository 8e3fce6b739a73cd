"""A fault inside a stage's process at a chosen moment.

A moment is one point at which the process is about to change something in its working directory, the project: a file
opened for writing, a rename, a folder made or removed, in the order in which Python's audit events tell of them.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULT, MODULE = "FAULT", "FAULT_MODULE"  # "kill 3", "kill os.rename" in the process that runs stages.optimize
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def install(act: Callable[[int, str, str], Any]) -> None:
    """Call `act` with number, kind and path of every moment of this process from now on."""
    root, process, seen = os.getcwd(), os.getpid(), 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in CHANGES and not (event == "open" and _is_write(arguments)):
            return
        if os.getpid() != process:  # a child that was forked has moments of its own
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(root + os.sep):
            seen += 1
            act(seen - 1, event, os.path.relpath(path, root))

    sys.addaudithook(hook)


def _is_write(arguments: tuple) -> bool:
    return isinstance(arguments[0], str | bytes | os.PathLike) and bool((arguments[2] or 0) & WRITING)


def fault(name: str, at: str) -> Callable[[int, str, str], None]:
    """At moment `at`: "kill" the process, let the disk be "full" from then on, or "wait" for the file `go`.

    Args:
        at: a number, or an event: its first moment.
    """

    def act(number: int, event: str, path: str) -> None:
        if at not in (str(number), event):
            return
        if name == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "full":
            fill_disk()
        if name == "wait":
            Path("waiting").touch()
            while not Path("go").exists():
                time.sleep(0.05)

    return act


def fill_disk() -> None:
    """No file may grow any more, whoever writes it: Python, a native library, a child. write(2) fails with EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
