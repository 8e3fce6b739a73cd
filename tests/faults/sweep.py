"""Run a stage once for every file that it writes, with a full disk from there on: sweep.py MODULE ARGUMENTS

Prints one JSON line a run: [moment, path that was about to be written, exit code, what it printed on standard error].
The stage is imported once and each run is a fork of that, so that a sweep does not pay for the imports.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable

from moments import fill_disk, install

Moment = tuple[int, str, str]


def run_forked(program: Callable[[], None], act: Callable[[int, str, str], None]) -> tuple[int, str]:
    """Exit code and standard error of the program in a fork with this hook."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(sender, 2)
        os._exit(_run(program, act))
    os.close(sender)
    with os.fdopen(receiver) as lines:
        said = lines.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def _run(program: Callable[[], None], act: Callable[[int, str, str], None]) -> int:
    try:
        install(act)
        program()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def moments(program: Callable[[], None]) -> list[Moment]:
    """Those of an undisturbed run at which a file is opened for writing; and the first, for what opens files unseen."""
    receiver, sender = os.pipe()
    code, said = run_forked(program, lambda *moment: os.write(sender, (json.dumps(moment) + "\n").encode()))
    os.close(sender)
    if code:
        sys.exit(f"the undisturbed run failed: {said}")
    with os.fdopen(receiver) as lines:
        found = list(map(json.loads, lines))
    return found[:1] + [moment for moment in found[1:] if moment[1] == "open"]


def main() -> None:
    sys.path.insert(0, os.getcwd())
    name = sys.argv[1].split(".")[1]
    program = getattr(importlib.import_module(sys.argv[1]), name)
    sys.argv = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for number, _, path in moments(program):
        code, said = run_forked(program, lambda at, *_, number=number: fill_disk() if at == number else None)
        print(json.dumps([number, path, code, said]), file=answers)


if __name__ == "__main__":
    main()
