"""Files as git holds them at a revision, or at one of DVC's experiments."""

import subprocess
from pathlib import Path

from clip_deploy.core.errors import DeployError

EXPERIMENTS = "refs/exps/"  # then two parts for the commit that an experiment began at, and its name
OF_DVC = ("exec", "stash", "celery")  # beside them: what DVC keeps for itself


def commit_of(revision: str) -> str:
    """Of a git revision, or of an experiment by its name in `dvc exp list`.

    Raises DeployError where there is none of that name, or several experiments have it.
    """
    if known := git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"):
        return known.strip()
    named = experiments().get(revision, [])
    if len(named) == 1:
        return named[0]
    if named:
        raise DeployError(
            f"{len(named)} experiments are called {revision!r}: give the commit of one, which `dvc exp list --all "
            "--sha-only` prints"
        )
    raise DeployError(
        f"git knows no revision {revision!r} here, and DVC no experiment of that name: give a revision, for example "
        "HEAD~1, main or v1.0 (in a shallow clone, fetch it first), or a name of `dvc exp list --all`"
    )


def experiments() -> dict[str, list[str]]:
    """The commits of DVC's experiments in this repository, by name."""
    found: dict[str, list[str]] = {}
    for line in (git("for-each-ref", "--format=%(objectname) %(refname)", EXPERIMENTS) or "").splitlines():
        commit, reference = line.split(" ", 1)
        place, *rest = reference.removeprefix(EXPERIMENTS).split("/")
        if place not in OF_DVC and len(rest) == 2:
            found.setdefault(rest[1], []).append(commit)
    return found


def committed(path: Path, commit: str) -> str | None:
    """What a file held then; None where it was not there. The path is from here: git's own begin at its top folder."""
    return git("show", f"{commit}:./{path.as_posix()}")


def git(*words: str) -> str | None:
    """What git prints; None where it fails."""
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None
