"""A virtual environment for each peer, and what the peer's build script makes in it. Both are kept and reused."""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from benchmarks.peers import contestant
from clip_deploy.core.environment import fingerprint, hardware
from clip_deploy.core.errors import UnavailableError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # everything comes from the checkpoint's folder


def requirements(peer: str) -> Path:
    return HERE / f"requirements-{peer}.txt"


def pins(peer: str) -> dict[str, str]:
    lines = requirements(peer).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def python_of(home: Path) -> Path:
    """The interpreter of the peer whose folder is `home`."""
    return home / "venv" / "bin" / "python"


def install(home: Path, peer: str) -> None:
    """Make the environment hold what the peer's requirements say, where it does not yet.

    Raises:
        UnavailableError: pip cannot install them.
    """
    folder = home / "venv"
    ready, wanted = folder / "ready", requirements(peer).read_text()
    if ready.exists() and ready.read_text() == wanted:
        return
    print(f"installing {peer} into {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    pip = [python_of(home), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "-r", requirements(peer)], home / "install.log")
    ready.write_text(wanted)  # last: an interrupted installation is made anew


def build(home: Path, peer: str, model: str, checkpoint: Path, calibration: Path) -> Path:
    """Let the peer build its contestants from the checkpoint; the folder that holds one folder for each of them.

    Those that are made already are not made again. What fails as a whole leaves each folder with the reason.

    Args:
        home: the peer's folder, where its environment is.
    """
    output, key = home / model, _key(peer, checkpoint, calibration)
    missing = [name for name in contestant.PEERS[peer] if not contestant.is_made(output / name, key)]
    if not missing:
        return output
    try:
        install(home, peer)
        print(f"building {', '.join(missing)}", flush=True)
        script = [python_of(home), "-m", f"benchmarks.peers.build_{peer}"]
        _run([*script, checkpoint, output, calibration, key], output / "build.log")
    except UnavailableError as error:
        for name in missing:
            contestant.write(output / name, {"unavailable": str(error)})
    return output


def _key(peer: str, checkpoint: Path, calibration: Path) -> str:
    """Changes with the pinned versions, the scripts, the model, the calibration set and the processor."""
    scripts = [HERE / f"build_{peer}.py", HERE / "clip_towers.py"]
    weights = [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]
    prints = [fingerprint(path) for path in (requirements(peer), *scripts, *weights, calibration)]
    return hashlib.sha256("".join([*prints, *hardware().instruction_sets]).encode()).hexdigest()


def _run(command: list[Any], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **OFFLINE}
        )
    if done.returncode:
        lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {done.returncode}"
        print(f"failed; see {log}", file=sys.stderr)
        raise UnavailableError(last)
