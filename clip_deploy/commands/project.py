"""The project's folder, for the commands that are run in it."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from clip_deploy.core.errors import ConfigError, DeployError
from clip_deploy.report.revisions import git

PARAMS, CONF, PIPELINE = Path("params.yaml"), Path("conf"), Path("dvc.yaml")
PROBED = ("reports/environment.json", "reports/inputs.json")  # those on the disk are the last run's


def check_project(*needed: Path) -> None:
    """Raises ConfigError where a file or folder of the project is not in the present one."""
    for path in needed:
        if not path.exists():
            raise ConfigError(
                f"there is no {path} here: run this command in the project's folder, a clone of its repository"
            )


def uncommitted() -> list[str]:
    """Files that git tracks and that are not as HEAD has them."""
    return [line[3:] for line in (git("status", "--porcelain", "-uno") or "").splitlines()]


def probed() -> dict[str, Any]:
    """What the stage `probe` would write now, by path; DeployError where it refuses a setting."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {path: Path(folder) / Path(path).name for path in PROBED}
        words = [f"{word}={path}" for word, path in zip(("output", "inputs"), paths.values(), strict=True)]
        done = subprocess.run([sys.executable, "-m", "stages.probe", *words], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise DeployError(done.stderr.strip().removeprefix("error: "))
        return {path: json.loads(file.read_text()) for path, file in paths.items()}
