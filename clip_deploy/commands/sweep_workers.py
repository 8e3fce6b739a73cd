"""Points of a sweep that jobs on other machines measure: through submitit (SLURM), or Ray.

Each job works in a checkout of its own, of the commit at which the sweep began. What is built already comes from the
project's DVC remote; what a job builds goes there, and its experiment into the git repository that it was cloned from.
A job whose machine or process ends is given out again; nothing of it is there, as experiments are pushed whole.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dvc.repo import Repo

from clip_deploy.core.errors import ConfigError, DataError, DeployError, UnavailableError, first_line
from clip_deploy.core.files import own_folder
from clip_deploy.core.subprocesses import die_with_parent
from clip_deploy.report.revisions import git

FOLDER = "clip-deploy-job-"  # of a job, in the temporary folder
TRIES = 3  # of a job: one that ends its process each time is not a machine's fault
ENGINES = "slurm, local (submitit on this machine), ray, or ray:ADDRESS"
DAY = 24 * 60  # minutes that a job of submitit may take; its own default is 5


@dataclass(frozen=True)
class Job:
    """One point, for a machine that knows nothing of this one.

    Attributes:
        repository: what it clones: a path or a URL.
        commit: what it checks out.
        name: of the experiment.
        words: of `dvc exp run`, behind the name.
    """

    repository: str
    commit: str
    name: str
    words: tuple[str, ...]


Engine = Callable[[Job], str | None]


def measure(job: Job) -> str | None:
    """On a worker: run a point's experiment and push it. Returns why the point failed, or None.

    Raises DeployError where the repository or the remote is out of reach.
    """
    with own_folder(FOLDER) as folder:
        checkout = folder / "checkout"
        _run(["git", "clone", "--quiet", "--no-checkout", job.repository, str(checkout)], folder)
        _run(["git", "checkout", "--quiet", "--detach", job.commit], checkout)
        if _run(["git", "ls-remote", "origin", place(job.commit, job.name)], checkout).stdout:
            return None  # a job before this one ended behind its work
        dvc = [sys.executable, "-m", "dvc"]
        _run([*dvc, "pull", "--run-cache", "--allow-missing"], checkout, check=False)  # else it is built here
        done = _run([*dvc, "exp", "run", "--name", job.name, *job.words], checkout, check=False)
        if done.returncode:
            return last_error(done.stdout)
        _run([*dvc, "exp", "push", "--run-cache", "origin", job.name], checkout)
    return None


def _run(words: Sequence[str], folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """With this process's Python first, and nothing of another repository's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_DIR", "GIT_WORK", "DVC_"))}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    done = subprocess.run(words, cwd=folder, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          check=False, preexec_fn=die_with_parent)  # fmt: skip
    if check and done.returncode:
        raise DeployError(f"{' '.join(words[:4])} failed: {last_error(done.stdout)}")
    return done


def last_error(text: str) -> str:
    """The line in which a stage says why, or else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no word"])[-1].removeprefix("error: ")


def open_engine(asked: str, folder: Path, parameters: dict[str, Any]) -> Engine:
    """What --on names.

    Args:
        folder: where submitit keeps its jobs' files: one that all machines share.
        parameters: of submitit's executor, as timeout_min and slurm_partition.

    Raises DataError for another name, UnavailableError without the library, DeployError without a cluster.
    """
    kind, _, address = asked.partition(":")
    if kind == "ray":
        return _on_ray(address or "auto")
    if asked not in ("slurm", "local"):
        raise DataError(f"--on is {asked!r}: accepted are {ENGINES}")
    if find_spec("submitit") is None:
        raise UnavailableError("--on slurm and local need submitit: pip install 'clip-deploy[sweep]'")
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=asked)
        executor.update_parameters(**{"name": "sweep", "timeout_min": DAY, **parameters})
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise DeployError(f"--on {asked}: {first_line(error)}") from error
    return lambda job: executor.submit(measure, job).result()


def _on_ray(address: str) -> Engine:
    from clip_deploy.inference.embed_ray import connect

    ray = connect(address)
    task = ray.remote(num_cpus=1, max_retries=0)(measure)
    return lambda job: ray.get(task.remote(job))


def answered(engine: Engine, job: Job) -> str | None:
    """As measure, though workers die."""
    said = ""
    for _ in range(TRIES):
        try:
            return engine(job)
        except Exception as error:  # each engine has its own for a worker that is gone
            said = first_line(error)
    return f"{TRIES} jobs ended without an answer: {said}"


def repository() -> str:
    """What jobs clone: the git remote `origin`, or this repository where it has none.

    Raises ConfigError without a DVC remote, through which jobs share what they build.
    """
    if not Repo().config["core"].get("remote"):
        raise ConfigError(
            "jobs share what they build through a DVC remote, and there is none: `dvc remote add -d NAME URL`"
        )
    found = git("remote", "get-url", "origin") or git("rev-parse", "--show-toplevel")
    return str(found).strip()


def fetch(source: str, commit: str, name: str) -> None:
    """Take over the experiments of that name, or pattern, which began at a commit, from where jobs push them."""
    if source == str(git("rev-parse", "--show-toplevel")).strip():
        return
    if git("fetch", "-q", source, f"{place(commit, name)}:{place(commit, name)}") is None:
        raise DeployError(f"experiments cannot be fetched from {source}: does `git ls-remote {source}` answer?")


def place(commit: str, name: str) -> str:
    """Where DVC keeps an experiment that began at a commit."""
    return f"refs/exps/{commit[:2]}/{commit[2:]}/{name}"
