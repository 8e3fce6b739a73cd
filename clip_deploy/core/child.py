"""Call a function in a process of its own: a library that crashes there takes one row with it, and not the pipeline."""

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from clip_deploy.core.errors import DeployError


class CrashError(DeployError):
    """The process ended without an answer."""


def call_in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns or raises, from a fork of this process; both must pickle.

    Where a platform cannot fork, it is called here. Raises CrashError where the process ends on its own.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return function(*arguments)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, function, arguments))
    child.start()
    sender.close()  # the child holds the only other end: its death is the end of the file
    try:
        returned, answer = receiver.recv()
    except EOFError:
        child.join()
        raise CrashError(f"the process {_ending(child.exitcode or 0)}") from None
    child.join()
    if returned:
        return answer
    raise answer


def die_with_parent() -> None:
    """A stopped process would outlive a killed parent for ever. See prctl(2), PR_SET_PDEATHSIG."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    die_with_parent()
    try:
        answer = True, function(*arguments)
    except Exception as error:
        answer = False, error
    sender.send(answer)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", as when memory runs out" if -code == signal.SIGKILL else ""
    return f"crashed with {signal.Signals(-code).name}{hint}"
