"""Keep in FP32 what the diagnosis of a failed target names.

It writes the nodes of reports/validate/<target>.json into the target's keep_fp32 in params.yaml; all else there stays
as it is, comments included.

example: clip-deploy apply ort-fp16 && dvc repro
"""

import argparse
import json
from pathlib import Path

import yaml

from clip_deploy.commands.project import PARAMS, check_project
from clip_deploy.core.errors import ConfigError
from clip_deploy.core.files import write_text
from clip_deploy.core.parsing import read_record
from clip_deploy.core.records import Validation

SECTIONS = ("optimize", "quantize")  # whose targets have keep_fp32
VALIDATION = Path("reports/validate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="one under optimize or quantize in params.yaml")


def run(given: argparse.Namespace) -> int:
    check_project(PARAMS)
    print(apply(given.target, PARAMS, VALIDATION))
    return 0


def apply(target: str, params: Path, validation: Path) -> str:
    """Add the nodes to params.yaml; return what to say of it.

    Raises ConfigError where the target has no keep_fp32, or no node was named for it.
    """
    text = params.read_text(encoding="utf-8")
    settings = _settings(text, target)
    record = read_record(Validation, validation / f"{target}.json")
    found = record.diagnosis
    nodes = [node for drop in found.drops for node in drop.nodes] if found else []
    if not nodes:
        notes = "; ".join(found.notes if found else []) or f"its status is {record.status}"
        raise ConfigError(f"{validation / target}.json names no nodes to keep in FP32: {notes}")
    write_text(params, _with_nodes(text, settings, nodes))
    return f"{params}: {target} keeps {', '.join(nodes)} in FP32; run `dvc repro`"


def _settings(text: str, target: str) -> yaml.MappingNode:
    """Where the target's settings stand in the text."""
    sections = dict(_entries(yaml.compose(text)))
    known = dict(entry for section in SECTIONS for entry in _entries(sections.get(section)))
    settings = known.get(target)
    if not isinstance(settings, yaml.MappingNode):
        raise ConfigError(
            f"{target} is no target of {' or '.join(SECTIONS)} in params.yaml, which alone have keep_fp32: accepted "
            f"are {', '.join(known) or 'none'}"
        )
    return settings


def _entries(node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    return [(key.value, value) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []


def _with_nodes(text: str, settings: yaml.MappingNode, nodes: list[str]) -> str:
    """The text with the nodes behind those that keep_fp32 has already, or as the settings' first entry."""
    held = dict(_entries(settings)).get("keep_fp32")
    if held is not None:
        written = json.dumps(list(dict.fromkeys([*(item.value for item in held.value), *nodes])))
        last = held if held.flow_style else held.value[-1]  # the end of a block is where the next key begins
        return text[: held.start_mark.index] + written + text[last.end_mark.index :]
    if not settings.value:  # {}
        inside = settings.start_mark.index + 1
        return f"{text[:inside]}keep_fp32: {json.dumps(nodes)}{text[inside:]}"
    first = settings.value[0][0].start_mark
    separator = ", " if settings.flow_style else "\n" + " " * first.column
    return f"{text[: first.index]}keep_fp32: {json.dumps(nodes)}{separator}{text[first.index :]}"
