"""Paths as they are typed."""

from pathlib import Path

from clip_deploy.core.errors import DataError


def local_path(text: str) -> Path:
    """A type of argparse's. Raises DataError where it is an address."""
    if "://" in text:
        raise DataError(f"{text} is an address: give a path on this machine, and download it first")
    return Path(text)
