import faulthandler
import gc
import os
import signal
import time

import pytest

from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.subprocesses import CrashError, call_in_child


def test_an_answer_comes_from_another_process():
    assert call_in_child(os.getpid) != os.getpid()
    assert call_in_child(sorted, [2, 1]) == [1, 2]


def test_an_error_is_raised_here():
    def refuse():
        raise UnavailableError("no such library")

    with pytest.raises(UnavailableError, match="no such library"):
        call_in_child(refuse)


def die_by(number):
    faulthandler.disable()  # pytest's would print a traceback
    os.kill(os.getpid(), number)


def test_a_crash_is_named():
    with pytest.raises(CrashError, match=r"the process crashed with SIGSEGV$"):
        call_in_child(die_by, signal.SIGSEGV)
    with pytest.raises(CrashError, match="crashed with SIGKILL, which happens when memory runs out"):
        call_in_child(die_by, signal.SIGKILL)
    with pytest.raises(CrashError, match="ended with exit code 3"):
        call_in_child(os._exit, 3)


def test_a_call_that_hangs_is_killed_and_named():
    with pytest.raises(CrashError, match=r"no answer within 0.2 s: the process hung and was killed$"):
        call_in_child(time.sleep, 600, timeout_s=0.2)
    assert call_in_child(sorted, [2, 1], timeout_s=60) == [1, 2]


def test_what_the_parent_left_for_the_collector_is_not_freed_in_the_fork():
    """A session of ONNX Runtime would wait there for threads that only the parent has."""

    class Session:
        def __init__(self):
            self.itself, self.process = self, os.getpid()

        def __del__(self):
            if os.getpid() != self.process:
                os._exit(9)

    gc.disable()
    try:
        Session()
        call_in_child(gc.collect)
    finally:
        gc.enable()
