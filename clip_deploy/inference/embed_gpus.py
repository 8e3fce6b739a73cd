"""`embed` on several GPUs of this machine: a process for each, which asks for one part after the other.

The same part has the same bytes whichever GPU makes it, and appears whole or not at all: what a killed run leaves is
taken up by the next, on however many GPUs.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from clip_deploy.core.environment import gpus
from clip_deploy.core.errors import DataError, DeployError, UnavailableError
from clip_deploy.core.package import read_package
from clip_deploy.core.subprocesses import die_with_parent, ending
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import PART, EmbedJob, Header, make_parts
from clip_deploy.inference.storage import Part

VISIBLE = "CUDA_VISIBLE_DEVICES"  # by which a process of CUDA's sees its GPU alone


@dataclass
class Opening:
    """A package (embed.Package) that each process opens by itself, and how."""

    folder: Path
    device: str
    threads: int | None
    feed: str
    dimension: int
    fingerprint: str
    batch_size: int

    @classmethod
    def read(cls, folder: Path, device: str, threads: int | None, feed: str = "exact") -> "Opening":
        """Raises DeployError where it is no package, or a file is not the one that was judged."""
        package = read_package(folder)
        encoder = package.encoder
        best = encoder.towers.vision.best_batch
        return cls(folder, device, threads, feed, encoder.dimension, package.fingerprint(), best)


def choose_gpus(asked: str) -> list[str]:
    """The GPUs that `--gpus` names, as CUDA_VISIBLE_DEVICES does: "all" of this process's, or some, as "0,2".

    Raises DataError where the list is none, UnavailableError where there are fewer.
    """
    visible = os.environ.get(VISIBLE)
    known = visible.split(",") if visible else [str(number) for number in range(len(gpus()))]
    if asked == "all":
        if not known:
            raise UnavailableError("--gpus is all, and nvidia-smi finds no GPU here: leave it out")
        return known
    chosen = asked.split(",")
    if len(set(chosen)) < len(chosen) or not all(number.isdigit() for number in chosen):
        raise DataError(f"--gpus is {asked!r}: give all, or numbers with commas between them, for example 0,1")
    if missing := [number for number in chosen if int(number) >= len(known)]:
        raise UnavailableError(
            f"--gpus names GPU {', '.join(missing)}, but this process has {len(known)} (numbered from 0)"
        )
    return [known[int(number)] for number in chosen]


def make_on_gpus(
    opening: Opening,
    chosen: list[str],
    job: EmbedJob,
    missing: dict[int, Part],
    advance: Callable[[int], object],
    begin: Callable[[], object] = lambda: None,
) -> Iterator[Header]:
    """Make parts in a process for each of the chosen GPUs, and yield their headers as they come.

    Args:
        begin: called when all processes have opened the package, before they get their first parts.

    Raises DeployError where a process cannot open the package, cannot write, or ends on its own.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    left = list(missing.items())[::-1]
    workers: dict[Connection, Worker] = {}
    try:
        for place, gpu in enumerate(chosen[: len(missing)]):
            here, there = context.Pipe()
            shares = place, min(len(chosen), len(missing))
            process = context.Process(target=_work, args=(gpu, shares, opening, job, there))
            process.start()
            there.close()  # the process holds the only other end: its death is the end of the file
            workers[here] = Worker(gpu, process)
        for connection, worker in workers.items():
            _answer(connection, worker)  # it asks for its first part
        begin()
        for connection, worker in workers.items():
            _hand_out(connection, worker, left)
        while busy := [connection for connection, worker in workers.items() if worker.parts or worker.wants_more]:
            for ready in wait(busy):
                assert isinstance(ready, Connection)
                header = _answer(ready, workers[ready])
                if header is None:
                    _hand_out(ready, workers[ready], left)
                else:
                    workers[ready].parts.popleft()
                    advance(header["rows"] + len(header["unreadable"]))
                    yield header
    finally:
        for connection, worker in workers.items():
            connection.close()
            worker.process.kill()
            worker.process.join()


@dataclass
class Worker:
    """A process, and the numbers of the parts that it has, the first under way."""

    gpu: str
    process: multiprocessing.process.BaseProcess
    parts: deque[int] = field(default_factory=deque)
    wants_more: bool = True


def _answer(connection: Connection, worker: Worker) -> Header | None:
    """A part's header, or None where the process asks for the next part."""
    try:
        answer: Header | DeployError | None = connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        when = f"while it made {PART.format(worker.parts[0])}" if worker.parts else "before it made a part"
        raise DeployError(
            f"the process of GPU {worker.gpu} {ending(worker.process.exitcode or 0)} {when}: run again to continue"
        ) from None
    if isinstance(answer, DeployError):
        raise answer
    return answer


def _hand_out(connection: Connection, worker: Worker, left: list[tuple[int, Part]]) -> None:
    following = left.pop() if left else None
    worker.wants_more = following is not None
    if following:
        worker.parts.append(following[0])
    with suppress(OSError):  # a process that has ended is found when its answer is read
        connection.send(following)


def _work(gpu: str, shares: tuple[int, int], opening: Opening, job: EmbedJob, connection: Connection) -> None:
    """Args: shares: which of how many shares of this process's cores it takes."""
    die_with_parent()
    os.environ[VISIBLE] = gpu
    _keep_to_share(*shares)
    try:
        classifier = ZeroShotClassifier.open(
            opening.folder, opening.device, opening.threads, feed=opening.feed, allow_spinning=False
        )
        if classifier.fingerprint != opening.fingerprint:
            raise DeployError(f"{opening.folder} is another package than when the run began: run again")
        for header in make_parts(classifier, job, _asked_for(connection), lambda images: None):
            connection.send(header)
    except DeployError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError):  # the run was stopped
        pass


def _asked_for(connection: Connection) -> Iterator[tuple[int, Part]]:
    while True:
        connection.send(None)
        following = connection.recv()
        if following is None:
            return
        yield following


def _keep_to_share(place: int, count: int) -> None:
    """Take a share of the cores, so that the processes' threads do not stand in each other's way."""
    if hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))
        if len(own) >= count:
            os.sched_setaffinity(0, own[place * len(own) // count : (place + 1) * len(own) // count])
