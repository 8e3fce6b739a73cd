"""What killed sweeps left is removed, where nobody uses it; one sweep of a name runs at a time.

`dvc exp run --temp` works in a copy of the project below .dvc/tmp. It stays where that is killed, and does not say of
which process it is. So a lock of the kernel is held by a sweep and by each run that it starts: a lock that is free says
that they have ended.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import held
from clip_deploy.core.json_files import read_json

COPIES = Path(".dvc/tmp/exps/standalone")  # of DVC: a folder for each run, and run/ID/ID.run with its facts
LOCKS = Path(".dvc/tmp/sweeps")


@contextmanager
def only_one(name: str) -> Iterator[tuple[int, ...]]:
    """Hold the sweep. What it starts inherits the descriptors that are given.

    Raises DeployError where another process holds it.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    path = LOCKS / f"{name}.lock"
    path.touch()
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(held(path))
        except BlockingIOError as error:
            raise DeployError(f"another sweep {name} runs in this project: wait until it ends, or stop it") from error
        if lock:
            remove_leftovers(name)
        yield lock


def remove_leftovers(name: str) -> None:
    """Remove the copies of this sweep's points, while its lock is held: their runs were killed.

    A copy in which a process works is of a run that someone started by hand with a point's name: it stays.
    """
    copies = _copies(name)
    used = _working_folders() if copies else set()
    for copy, facts in copies.items():
        if not any(folder.is_relative_to(copy) for folder in used):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.rmtree(facts.parent, ignore_errors=True)
            print(f"removed what a killed run left: {COPIES / copy.name}")


def _copies(name: str) -> dict[Path, Path]:
    """The copies of points of a sweep, each with DVC's file about it."""
    found = {}
    for path in COPIES.glob("run/*/*.run"):
        with suppress(DeployError):  # half a file: it says of no copy whose it is
            facts = read_json(path)
            copy = Path(facts["root_dir"])
            is_point = re.fullmatch(f"{re.escape(name)}-[0-9a-f]{{8}}", facts["name"] or "")
            if is_point and copy.is_dir() and copy.parent == COPIES.resolve():
                found[copy] = path
    return found


def _working_folders() -> set[Path]:
    """Of all processes that this user may ask."""
    folders = (process.info["cwd"] for process in psutil.process_iter(["cwd"]))
    return {Path(folder) for folder in folders if folder}
