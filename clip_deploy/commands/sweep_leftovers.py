"""What killed sweeps and killed jobs left is removed, where nobody uses it; one sweep of a name runs at a time.

`dvc exp run --temp` works in a copy of the project below .dvc/tmp, and a job in a checkout in the machine's temporary
folder. Both stay where they are killed, and neither says of which process it is. So a lock of the kernel is held by a
sweep and by each run that it starts, and another one by each job: a lock that is free says that they have ended.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from clip_deploy.core.errors import DeployError
from clip_deploy.core.json_files import read_json

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked, and nothing removed
    fcntl = None  # type: ignore[assignment]

COPIES = Path(".dvc/tmp/exps/standalone")  # of DVC: a folder for each run, and run/ID/ID.run with its facts
LOCKS = Path(".dvc/tmp/sweeps")
JOB = "clip-deploy-job-"  # in the temporary folder


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
            lock = stack.enter_context(_held(path))
        except BlockingIOError as error:
            raise DeployError(f"another sweep {name} runs in this project: wait until it ends, or stop it") from error
        if lock:
            remove_leftovers(name)
        yield lock


@contextmanager
def job_folder() -> Iterator[Path]:
    """A folder of one job's own. Those that killed jobs of this user left on this machine are removed."""
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{JOB}*") if fcntl else ():
        with suppress(OSError), _held(left):  # its job lives, or it is another user's
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".clip-deploy-"))
    try:
        with _held(folder):
            folder = folder.rename(parent / f"{JOB}{folder.name.rpartition('-')[2]}")  # now that it is held
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(path: Path) -> Iterator[tuple[int, ...]]:
    """Lock a file or folder as long as a process has the descriptors; BlockingIOError where others hold it."""
    if fcntl is None:
        yield ()
        return
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # neither a link nor a pipe of someone else
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield (file,)
    finally:
        os.close(file)


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
