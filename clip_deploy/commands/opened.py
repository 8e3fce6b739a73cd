"""What the commands that open a package have in common."""

import argparse
import sys
from pathlib import Path
from typing import Any

from clip_deploy.inference.classifier import ZeroShotClassifier

UNREADABLE = 3  # exit code


def add_package_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--package", type=Path, default=Path("artifacts/package"), help="default: %(default)s")
    parser.add_argument("--device", help="cpu or cuda; default: the one that the package was made for")
    parser.add_argument("--threads", type=int, help="of each tower; default: ONNX Runtime's choice")
    parser.add_argument("--cache", type=Path, help="a folder in which embeddings of texts are kept")


def open_package(given: argparse.Namespace, **options: Any) -> ZeroShotClassifier:
    """Args: options: others of ZeroShotClassifier.open."""
    return ZeroShotClassifier.open(
        given.package, device=given.device, threads=given.threads, cache_folder=given.cache, **options
    )


def name_unreadable(unreadable: list[str]) -> int:
    """Say what could not be read, and return the exit code."""
    for line in unreadable:
        print(f"warning: {line}", file=sys.stderr)
    return UNREADABLE if unreadable else 0
