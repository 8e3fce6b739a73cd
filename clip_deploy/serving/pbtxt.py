"""Write protobuf's text format, in which Triton reads config.pbtxt, from dictionaries."""

import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]  # the fields that are set: scalars, messages, and lists of them


class Word(str):
    """An enum's value: written without quotes."""


def pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """`message` as lines: a mapping is a message, a list of mappings a repeated message, other lists are one line."""
    return "".join(_field(name, value, indent) for name, value in message.items())


def mapped(entries: Mapping[str, Any]) -> list[Message]:
    """A map field, which is a repeated message of keys and values."""
    return [{"key": key, "value": value} for key, value in entries.items()]


def _field(name: str, value: Any, indent: str) -> str:
    if isinstance(value, Mapping):
        return f"{indent}{name} {{\n{pbtxt(value, indent + '  ')}{indent}}}\n"
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return "".join(_field(name, item, indent) for item in value)
    if isinstance(value, list):
        return f"{indent}{name}: [{', '.join(map(_scalar, value))}]\n"
    return f"{indent}{name}: {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    return json.dumps(value)  # strings, numbers and booleans are written as in JSON
