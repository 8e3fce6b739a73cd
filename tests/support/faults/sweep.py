"""Run a stage once for each of its moments, with a fault there: main() with full|kill OUTPUTS MODULE ARGUMENTS

full: from each file's opening on, the disk is full. kill: SIGKILL at moments spread over the stage, and then it runs
undisturbed. Prints one JSON line a run: [moment, event, path that was about to be changed, exit code, what it printed
on standard error, {path: hash} of what lies in OUTPUTS (a JSON list)]; the moment of an undisturbed run is null.
The stage is imported once and each run is a fork of that, so that a sweep does not pay for the imports.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

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
    """Those of an undisturbed run."""
    receiver, sender = os.pipe()
    code, said = run_forked(program, lambda *moment: os.write(sender, (json.dumps(moment) + "\n").encode()))
    os.close(sender)
    if code:
        sys.exit(f"the undisturbed run failed: {said}")
    with os.fdopen(receiver) as lines:
        return list(map(json.loads, lines))


def writes(found: list[Moment]) -> list[Moment]:
    """At which a file is opened for writing; and the first, for what opens files unseen."""
    return found[:1] + [moment for moment in found[1:] if moment[1] == "open"]


def spread(found: list[Moment]) -> list[Moment]:
    """The first, the last, three between, and where the old output is gone and the new one is not yet in its place."""
    replacing = [moment for moment in found if moment[1] == "os.rename"]
    steps = [found[len(found) * quarter // 4] for quarter in (0, 1, 2, 3)]
    return sorted({tuple(moment) for moment in [*steps, *replacing[:1], *replacing[-1:], found[-1]]})


def main() -> None:
    sys.path.insert(0, os.getcwd())
    from clip_deploy.core.artifact import hashes
    from clip_deploy.core.files import sha256

    fault, outputs, module = sys.argv[1], list(map(Path, json.loads(sys.argv[2]))), sys.argv[3]
    program = getattr(importlib.import_module(module), module.split(".")[1])
    sys.argv = sys.argv[3:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(moment: Moment | tuple[None, None, None], result: tuple[int, str]) -> None:
        files = {path: sha256(path) for path in outputs if path.is_file()}
        folders = {
            path / name: facts["sha256"] for path in outputs if path.is_dir() for name, facts in hashes(path).items()
        }
        state = {str(path): digest for path, digest in {**files, **folders}.items() if path.suffix != ".partial"}
        print(json.dumps([*moment, *result, state]), file=answers)

    found = moments(program)
    for moment in writes(found) if fault == "full" else spread(found):
        answer(moment, run_forked(program, ACTS[fault](moment[0])))
        if fault == "kill":
            answer((None, None, None), run_forked(program, lambda *_: None))


ACTS: dict[str, Callable[[int], Callable[[int, str, str], None]]] = {
    "full": lambda number: lambda at, *_: fill_disk() if at == number else None,
    "kill": lambda number: lambda at, *_: os.kill(os.getpid(), signal.SIGKILL) if at == number else None,
}
