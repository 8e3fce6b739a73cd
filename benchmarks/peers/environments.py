"""A virtual environment for each peer, and what the peer's build script makes in it. Both are kept and reused."""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.peers import contestant
from clip_deploy.environment import fingerprint
from clip_deploy.errors import UnavailableError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "peers"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # everything comes from the checkpoint's folder


def requirements(peer: str) -> Path:
    return HERE / f"requirements-{peer}.txt"


def pins(peer: str) -> dict[str, str]:
    lines = requirements(peer).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def python_of(peer: str) -> Path:
    """The peer's interpreter, in an environment that holds what its requirements say; made where it does not.

    Raises UnavailableError where pip cannot install them.
    """
    folder = BUILD / peer / "venv"
    python, ready, wanted = folder / "bin" / "python", folder / "ready", requirements(peer).read_text()
    if not ready.exists() or ready.read_text() != wanted:
        print(f"installing {peer} into {folder.relative_to(ROOT)}", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "-r", requirements(peer)], BUILD / peer / "install.log")
        ready.write_text(wanted)
    return python


def build(peer: str, model: str, checkpoint: Path, calibration: Path) -> Path:
    """Let the peer build its contestants from the checkpoint; the folder that holds one folder for each of them.

    What fails as a whole leaves each contestant's folder with the reason.
    """
    output = BUILD / peer / model
    made, key = output / "made", _key(peer, checkpoint, calibration)
    if made.exists() and made.read_text() == key:
        return output
    try:
        python = python_of(peer)
        print(f"building {', '.join(contestant.PEERS[peer])}", flush=True)
        _run([python, "-m", f"benchmarks.peers.build_{peer}", checkpoint, output, calibration], output / "build.log")
        made.write_text(key)  # a contestant that its script could not build fails the same way next time
    except UnavailableError as error:
        for name in contestant.PEERS[peer]:
            contestant.write(output / name, {"unavailable": str(error)})
    return output


def _key(peer: str, checkpoint: Path, calibration: Path) -> str:
    """Changes with the pinned versions, the script, the checkpoint and the calibration set."""
    paths = [requirements(peer), HERE / f"build_{peer}.py", checkpoint, calibration]
    return hashlib.sha256("".join(map(fingerprint, paths)).encode()).hexdigest()


def _run(command: list, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **OFFLINE}
        )
    if done.returncode:
        lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {done.returncode}"
        print(f"failed; see {log.relative_to(ROOT)}", file=sys.stderr)
        raise UnavailableError(last)
