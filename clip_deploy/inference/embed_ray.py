"""`embed` on many machines: Ray Data gives whole parts to workers that have the package open.

A part is what is tried again where a worker dies, for ever by Ray itself and TRIES times here. It has the same bytes
whoever makes it, and appears whole or not at all under its own name: nothing is lost, nothing is there twice.
"""

import json
import logging
import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clip_deploy.core.errors import DataError, DeployError, first_line
from clip_deploy.core.manifest import INSIDE
from clip_deploy.core.package import read_package
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import PART, EmbedJob, Header, check_header, make_part
from clip_deploy.inference.storage import Part, has_part, local

REACH_S = 5  # what a connection to the cluster may take
TRIES = 3  # of a part: one whose process always dies is not a machine's fault


@dataclass
class Shipped:
    """A package as it goes to the workers, which need no copy of their own.

    Attributes:
        files: their contents by their names.
        device: "cpu" or "cuda", of each worker; this machine needs no GPU.
        threads: of each worker, and the CPUs that it takes.
        batch_size: as ZeroShotClassifier has it.
        feed: as ZeroShotClassifier.open takes it.
    """

    dimension: int
    fingerprint: str
    files: dict[str, bytes]
    device: str
    threads: int
    batch_size: int
    feed: str = "exact"

    @classmethod
    def read(cls, folder: Path, device: str | None, threads: int | None, feed: str = "exact") -> "Shipped":
        """Raises DeployError where it is no package, or a file is not the one that was judged."""
        package = read_package(folder)
        files = {name: (folder / name).read_bytes() for name in (INSIDE, *package.files)}
        encoder = package.encoder
        best = encoder.towers.vision.best_batch
        return cls(encoder.dimension, package.fingerprint(), files, device or encoder.device, threads or 1, best, feed)

    def open(self) -> ZeroShotClassifier:
        """Open it on a worker. Raises DeployError where what arrived is not what was sent."""
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for name, content in self.files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            classifier = ZeroShotClassifier.open(
                folder, self.device, self.threads, feed=self.feed, allow_spinning=False
            )
        if classifier.fingerprint != self.fingerprint:
            raise DeployError(f"the package's hash is {classifier.fingerprint} here, and {self.fingerprint} was sent")
        return classifier


class Attempts:
    """How often each part was begun, and what was done last: what kills its process again and again is named."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()
        self.last: dict[int, str] = {}

    def begin(self, number: int) -> tuple[int, str]:
        """Which attempt this is, and what the one before did last."""
        self.begun[number] += 1
        return self.begun[number], self.last.get(number, "it began")

    def note(self, number: int, doing: str) -> None:
        self.last[number] = doing


class SharedAttempts:
    """Attempts in a process of the cluster, which all workers ask."""

    def __init__(self) -> None:
        self.actor = load_ray().remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()

    def begin(self, number: int) -> tuple[int, str]:
        found: tuple[int, str] = load_ray().get(self.actor.begin.remote(number))
        return found

    def note(self, number: int, doing: str) -> None:
        load_ray().get(self.actor.note.remote(number, doing))


class EmbedActor:
    """A process of the cluster that makes parts, one after the other."""

    def __init__(self, package: Any, job: EmbedJob, attempts: Attempts | SharedAttempts) -> None:
        self.package, self.job, self.attempts = package, job, attempts
        self.classifier: ZeroShotClassifier | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """A part's header as JSON, or the error that stops the run: raised here, Ray would bury it in a traceback."""
        try:
            return {"header": json.dumps(self._make(int(row["number"]), pickle.loads(row["part"]))), "error": ""}
        except DeployError as error:
            return {"header": "", "error": f"{error} (on {os.uname().nodename})"}

    def _make(self, number: int, part: Part) -> Header:
        if has_part(self.job.output, PART.format(number)):  # written by a worker that died before it said so
            return check_header(self.job, number, part)
        attempt, last = self.attempts.begin(number)
        if attempt > TRIES:
            raise DeployError(
                f"{PART.format(number)} is given up: the process that made it died {TRIES} times, the last time as "
                f"{last}; remove or replace the images that end it"
            )
        if attempt > 1:
            self._read_one_by_one(number, part)
        if self.classifier is None:
            self.classifier = load_ray().get(self.package).open()
        return make_part(self.classifier, self.job, number, part, lambda images: None)

    def _read_one_by_one(self, number: int, part: Part) -> None:
        """Read all pictures and keep none, so that the one which ends this process is known."""
        names = []
        for name, picture in part.pictures():
            names.append(name)
            self.attempts.note(number, f"it read {name}")
            if callable(picture):
                with suppress(DataError):
                    picture()
        self.attempts.note(number, f"it embedded {len(names)} images, {' to '.join([*names[:1], *names[-1:]])}")


def make_on_ray(
    package: Shipped, address: str, job: EmbedJob, missing: dict[int, Part], advance: Callable[[int], object]
) -> Iterator[Header]:
    """Make parts on a Ray cluster, as many at a time as it has CPUs (or GPUs) for, and yield their headers.

    The cluster gets this machine's clip_deploy and the package; its own environment needs the runtime's libraries,
    pyarrow and ray[data]. Folders must be on storage that all machines share.

    Args:
        address: as ray.init takes it: "auto", "local" or host:port.

    Raises:
        DeployError: ray is missing, there is no cluster, a worker cannot read, write or open the package, or a part
            ended its process TRIES times.
    """
    if not missing:
        return
    if folder := local(job.output):
        job.output = str(folder.absolute())
    ray = connect(address)
    try:
        sent = ray.put(package)  # held until the end: a worker that is started again needs it again
        for row in _rows(ray, package, sent, job, missing):
            if row["error"]:
                raise DeployError(row["error"])
            header = json.loads(row["header"])
            advance(header["rows"] + len(header["unreadable"]))
            yield header
    except ray.exceptions.RayError as error:
        raise DeployError(f"Ray gave up: {str(error).strip().splitlines()[-1]}; run again to continue") from error
    finally:
        ray.shutdown()


def _rows(ray: Any, package: Shipped, sent: Any, job: EmbedJob, missing: dict[int, Part]) -> Iterator[dict[str, str]]:
    """One row a part, as they are done."""
    items = [{"number": number, "part": pickle.dumps(part)} for number, part in missing.items()]
    parts = ray.data.from_items(items, override_num_blocks=len(items))
    made = parts.map(
        EmbedActor,
        fn_constructor_args=(sent, job, SharedAttempts()),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=len(items)),
        num_cpus=package.threads,
        num_gpus=int(package.device == "cuda"),
    )
    found: Iterator[dict[str, str]] = made.iter_rows()
    return found


def connect(address: str) -> Any:
    """The module ray, connected to a cluster that has this package's code."""
    ray = load_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of our own tells nobody
    code = {"py_modules": [str(Path(__file__).parent.parent)]}
    try:
        _reach(address)
        ray.init(address, runtime_env=code, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise DeployError(f"no Ray cluster at {address} ({reason}): give auto, local or host:port") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _reach(address: str) -> None:
    """Raise OSError where nothing listens at host:port: Ray itself tries for minutes."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()


def load_ray() -> Any:
    """The module ray with ray.data, which nothing else in a deployment needs."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DeployError("Ray is not installed: pip install 'clip-deploy[ray]'") from error
    return ray
