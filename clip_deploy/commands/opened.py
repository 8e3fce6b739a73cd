"""What the commands that open a package have in common."""

import argparse
import sys
from pathlib import Path
from typing import Any

from clip_deploy.commands.paths import local_path
from clip_deploy.core.errors import DataError
from clip_deploy.inference.classifier import ZeroShotClassifier

UNREADABLE = 3  # exit code


def add_package_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--package",
        type=_package,
        default="artifacts/package",
        help="the folder that `dvc repro` or `clip-deploy package` wrote; default: %(default)s",
    )
    parser.add_argument("--device", help="cpu or cuda; default: the one that the package was made for")
    parser.add_argument("--threads", type=int, help="of each tower; default: its runtime's choice")
    parser.add_argument("--cache", type=local_path, help="a folder in which embeddings of texts are kept")


def _package(text: str) -> Path:
    """A type of argparse's, of the default too. Raises DataError where nothing is there."""
    folder = local_path(text)
    if not folder.exists():
        raise DataError(
            f"there is no package {folder}: give its folder, which `dvc repro` or `clip-deploy package` wrote, with "
            "--package"
        )
    return folder


def open_package(given: argparse.Namespace, **options: Any) -> ZeroShotClassifier:
    """Open it as the command line says; `options` are others of ZeroShotClassifier.open.

    Raises DeployError as that does, and where --cache is a file.
    """
    if given.cache and given.cache.exists() and not given.cache.is_dir():
        raise DataError(f"--cache is {given.cache}, a file: give a folder, which is made if need be")
    return ZeroShotClassifier.open(
        given.package, device=given.device, threads=given.threads, cache_folder=given.cache, **options
    )


def name_unreadable(unreadable: list[str]) -> int:
    """Say what could not be read, and return the exit code."""
    for line in unreadable:
        print(f"warning: {line}", file=sys.stderr)
    return UNREADABLE if unreadable else 0
