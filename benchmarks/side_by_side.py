"""Run the pipeline on a machine with many cores: build and check targets side by side, then time them one by one.

    python -m benchmarks.side_by_side jobs=8
    python -m benchmarks.side_by_side jobs=8 timed=false      # builds and checks alone
    python -m benchmarks.side_by_side jobs=8 resume=true      # what that, or an interrupted or failed run, left undone

DVC runs one stage after another. This takes the stages, their commands and their order from dvc.yaml, and runs all of
them, needed or not; those that time a target run alone. Stages that run at once get cores of their own. `dvc commit
--force` then tells DVC of the results.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import Queue
from time import monotonic

from dvc.repo import Repo

from clip_deploy.core.files import write_text

DONE = Path("build/side_by_side.json")  # the stages that are done, for resume=true
TIMED = ("benchmark@", "end_to_end@")
LONG = ("export_aoti@",)  # minutes of a compiler: begun before others that are ready
LAST_CHARACTERS = 2000  # of a failed stage's output that are shown


def main() -> None:
    given = {"jobs": "4", "timed": "true", "resume": "false"} | dict(word.split("=", 1) for word in sys.argv[1:])
    jobs = int(given["jobs"])
    graph = Repo(".").index.graph
    commands = {stage.addressing: stage.cmd for stage in graph}
    before = {stage.addressing: {other.addressing for other in graph.successors(stage)} for stage in graph}
    done = set(json.loads(DONE.read_text())) if given["resume"] == "true" and DONE.exists() else set()
    plan = list(zip(phases(before), (1, jobs, 1, jobs), strict=True))[: 4 if given["timed"] == "true" else 2]
    for names, width in plan:
        done |= run(names, before, commands, width, done, lambda now: write_text(DONE, json.dumps(sorted(now))))
    if left := [name for names, _ in plan for name in names if name not in done]:
        sys.exit(f"error: failed, or waited for a stage that did: {', '.join(left)}")


def phases(before: dict[str, set[str]]) -> list[list[str]]:
    """The probe, which counts the cores; the stages that time nothing; those that do; and those that wait for them."""
    timed = [name for name in before if name.startswith(TIMED)]
    behind: list[str] = []
    while more := [name for name in before if name not in [*timed, *behind] and before[name] & {*timed, *behind}]:
        behind += more
    probe = [name for name in before if name == "probe"]
    return [probe, [name for name in before if name not in {*probe, *timed, *behind}], timed, behind]


def run(
    names: list[str],
    before: dict[str, set[str]],
    commands: dict[str, str],
    jobs: int,
    done: set[str],
    remember: Callable[[set[str]], None] = lambda done: None,
) -> set[str]:
    """Run those that are not done as those that they wait for are, so many at a time; return all that are done then."""
    done, begun = set(done), set(done)
    running: dict[Future[bool], str] = {}
    shares = share_out(sorted(os.sched_getaffinity(0)), jobs)
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            ready = [name for name in names if name not in begun and before[name] <= done]
            ready.sort(key=lambda name: not name.startswith(LONG))
            begun |= set(ready)
            running |= {pool.submit(execute, name, commands[name], shares): name for name in ready}
            if not running:
                return done
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                done |= {name} if future.result() else set()
            remember(done)


def share_out(cores: list[int], jobs: int) -> Queue[list[int]]:
    """The cores in as many parts as there are jobs."""
    shares: Queue[list[int]] = Queue()
    for job in range(jobs):
        shares.put(cores[job::jobs] or [cores[job % len(cores)]])
    return shares


def execute(name: str, command: str, shares: Queue[list[int]]) -> bool:
    """Run one stage's command on a share of the cores and say how it ended."""
    share = shares.get()
    started = monotonic()
    pinned = ["taskset", "--cpu-list", ",".join(map(str, share)), "sh", "-c", command]
    finished = subprocess.run(pinned, capture_output=True, text=True, check=False)
    shares.put(share)
    good = finished.returncode == 0
    print(f"{name}: {'done' if good else 'FAILED'} in {monotonic() - started:.1f} s", flush=True)
    if not good:
        print((finished.stdout + finished.stderr)[-LAST_CHARACTERS:], flush=True)
    return good


if __name__ == "__main__":
    main()
