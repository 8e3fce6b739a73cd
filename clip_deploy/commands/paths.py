"""Paths as they are typed."""

from pathlib import Path

from clip_deploy.core.errors import DataError


def local_path(text: str) -> Path:
    """A type of argparse's. Raises DataError where it is an address."""
    if "://" in text:
        raise DataError(f"{text} is an address: accepted is a path on this machine; download it first")
    return Path(text)
