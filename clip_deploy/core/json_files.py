"""Result files for git and for `dvc metrics`: stable order, rounded at write time, one trailing newline."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import write_text

DIGITS = 5  # significant digits of a measured number


def write_json(path: Path, record: Mapping[str, Any] | list[Any]) -> None:
    """Write a record with its numbers rounded (rounded), whole or not at all. Raises DiskError."""
    write_text(path, json.dumps(rounded(record), indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises DeployError where it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DeployError(f"cannot read {path} ({error}); run `dvc repro`") from error


def rounded(value: Any) -> Any:
    """`value` with every float cut to DIGITS significant digits; NaN and infinities become None (JSON has none)."""
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
