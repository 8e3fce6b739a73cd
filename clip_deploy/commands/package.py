"""Put a target and all that a deployment needs into one folder.

The target must have passed its gate in the last `dvc repro`. The command runs the pipeline's stage `package` with
another target and another folder.

example: clip-deploy package ort-fp16 --output build/package
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from dvc.repo import Repo

from clip_deploy.builders.package import RECOMMENDED
from clip_deploy.commands.paths import local_path
from clip_deploy.commands.project import PARAMS, PIPELINE, check_project
from clip_deploy.core.errors import ConfigError
from clip_deploy.core.manifest import INSIDE

ADVICE = "reports/recommendation.json"  # on all targets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="a row of the table, or `recommended`")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=local_path,
        required=True,
        help="the folder to write; a package that is there is replaced",
    )


def run(given: argparse.Namespace) -> int:
    check_project(PARAMS, PIPELINE)
    check_output(given.output)
    command = Repo().stage.load_one(name="package").cmd
    settings = {"target": given.target, "output": str(given.output)}
    words = by_hand(command, settings if given.target == RECOMMENDED else settings | {"advice": ADVICE})
    return subprocess.run(words, check=False).returncode


def check_output(folder: Path) -> None:
    """Raises ConfigError where something else than a package would be replaced."""
    if folder.exists() and not (folder / INSIDE).is_file():
        raise ConfigError(f"--output is {folder}, which exists and is not a package: give a new folder")


def by_hand(command: str, settings: dict[str, str]) -> list[str]:
    """The words of a stage's command, with other values of some settings in the quotes of Hydra's grammar."""
    quoted = {key: value.replace("\\", "\\\\").replace('"', '\\"') for key, value in settings.items()}
    words = [word for word in shlex.split(command) if word.split("=")[0] not in settings]
    return [sys.executable, *words[1:], *(f'{key}="{value}"' for key, value in quoted.items())]
