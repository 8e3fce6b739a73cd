"""Keep the nodes in FP32 that the diagnosis of a failed target names.

It writes the nodes of reports/validate/<target>.json into the target's keep_fp32 in params.yaml. Everything else in
that file stays as it is, comments included.

example: clip-deploy apply ort-fp16 && dvc repro
"""

import argparse
from pathlib import Path
from typing import Any

from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

from clip_deploy.commands.project import PARAMS, check_project
from clip_deploy.core.errors import ConfigError
from clip_deploy.core.files import write_text
from clip_deploy.core.parsing import read_record
from clip_deploy.core.records import Validation

SECTIONS = ("optimize", "quantize")  # whose targets have keep_fp32
VALIDATION = Path("reports/validate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="a target under optimize or quantize in params.yaml")


def run(given: argparse.Namespace) -> int:
    check_project(PARAMS)
    print(apply(given.target, PARAMS, VALIDATION))
    return 0


def apply(target: str, params: Path, validation: Path) -> str:
    """Add the nodes to params.yaml; return what to say of it.

    Raises ConfigError where the target has no keep_fp32, or no node was named for it.
    """
    found = parse_yaml_for_update(params.read_text(encoding="utf-8"), str(params))
    settings = _settings(found, target)
    record = read_record(Validation, validation / f"{target}.json")
    diagnosis = record.diagnosis
    nodes = [node for drop in diagnosis.drops for node in drop.nodes] if diagnosis else []
    if not nodes:
        notes = "; ".join(diagnosis.notes if diagnosis else []) or f"its status is {record.status}"
        raise ConfigError(f"{validation / target}.json names no nodes to keep in FP32: {notes}")
    held = settings.pop("keep_fp32", None) or []
    settings.insert(0, "keep_fp32", list(dict.fromkeys([*held, *nodes])))  # first: a comment may follow the last
    write_text(params, dumps_yaml(found))
    return f"{params}: {target} keeps {', '.join(nodes)} in FP32; run `dvc repro`"


def _settings(params: Any, target: str) -> Any:
    """The target's, a mapping that keeps its comments."""
    known = {name: entry for section in SECTIONS for name, entry in (params.get(section) or {}).items()}
    if target not in known:
        raise ConfigError(
            f"{target} is not a target under {' or '.join(SECTIONS)} in params.yaml, and only these have keep_fp32: "
            f"accepted are {', '.join(known) or 'none'}"
        )
    return known[target]
