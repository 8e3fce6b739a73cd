"""Call a function in a process of its own: a library that crashes there takes one row with it, and not the pipeline."""

import contextlib
import gc
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_deploy.core.errors import DeployError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SHELLS = {"ash", "bash", "busybox", "dash", "fish", "ksh", "sh", "zsh"}


class CrashError(DeployError):
    """The process ended without an answer, or gave none in time."""


def call_in_child(function: Callable[..., Any], *arguments: Any, timeout_s: float | None = None) -> Any:
    """What `function(*arguments)` returns or raises, from a fork of this process; both must pickle.

    Where a platform cannot fork, it is called here, without a limit.

    Raises CrashError where the process ends on its own, or has no answer after `timeout_s` seconds: it is killed then.
    """
    import multiprocessing  # not with every stage's start

    if "fork" not in multiprocessing.get_all_start_methods():
        return function(*arguments)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, function, arguments))
    child.start()
    sender.close()  # the child holds the only other end: its death is the end of the file
    try:
        if not receiver.poll(timeout_s):
            child.kill()
            raise CrashError(hung(timeout_s))
        returned, answer = receiver.recv()
    except EOFError:
        child.join()
        raise CrashError(f"the process {ending(child.exitcode or 0)}") from None
    child.join()
    if returned:
        return answer
    raise answer


def die_with_parent() -> None:
    """A stopped process would outlive a killed parent for ever. See prctl(2), PR_SET_PDEATHSIG."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def die_with_dvc() -> None:
    """As die_with_parent, in a stage: dash, unlike bash, stays between DVC and its command, and would outlive DVC."""
    die_with_parent()
    if sys.platform != "linux":
        return
    shell = Path("/proc", str(os.getppid()))
    with contextlib.suppress(OSError):  # no /proc, no pidfd_open(2): a stage then lives as long as its shell
        if (shell / "comm").read_text().strip() in SHELLS:
            dvc = int((shell / "stat").read_text().rpartition(")")[2].split()[1])  # after the name: state, parent
            threading.Thread(target=_die_after, args=(os.pidfd_open(dvc),), daemon=True).start()


def _die_after(process: int) -> None:
    select.select([process], [], [])  # readable once it has ended
    os.kill(os.getpid(), signal.SIGKILL)


def _answer(sender: "Connection", function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    die_with_parent()
    gc.freeze()  # a session that the parent left would wait, as it is freed, for threads that no fork has
    try:
        answer = True, function(*arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())  # which does not pickle by itself
        answer = False, error
    sender.send(answer)


def hung(timeout_s: float | None) -> str:
    """What a message says of a process that gave no answer in time."""
    return f"no answer within {timeout_s:g} s: the process hung and was killed"


def ending(code: int) -> str:
    """How a process ended, from its exit code as subprocess gives it: below 0 by a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", which happens when memory runs out" if -code == signal.SIGKILL else ""
    return f"crashed with {signal.Signals(-code).name}{hint}"
