"""JSON into dataclasses and back: each entry is there, known and of its type, or the file is of another version.

A float that is NaN stands as null in a file (json_files.rounded), and what was not measured does not stand there.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from math import nan
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from clip_deploy.core.errors import ConfigError
from clip_deploy.core.json_files import read_json

T = TypeVar("T")
AGAIN = "run `dvc repro`"
FLAT = {"flat": True}  # of a field: the entries of its dataclass stand among those of the one around it


class UnlikeError(Exception):
    """What of a file is not as this version writes it."""


def read_record(kind: type[T], path: Path, way_out: str = AGAIN, null_is_nan: bool = True) -> T:
    """The dataclass `kind` from a JSON file. Raises DeployError where it cannot be read, and as parse does."""
    return parse(kind, read_json(path), str(path), way_out, null_is_nan)


def parse(kind: type[T], content: Any, where: str, way_out: str = AGAIN, null_is_nan: bool = True) -> T:
    """`content`, as json.loads gives it, as a `kind`: a dataclass, or a dictionary or list of them.

    Args:
        where: the file, for the message.
        way_out: what to do where it is of another version.
        null_is_nan: whether null in the place of a float, optional or not, is NaN.

    Raises ConfigError, in one line, where an entry is missing, unknown or of another type.
    """
    try:
        found: T = _parsed(kind, content, "", null_is_nan)
    except UnlikeError as error:
        raise ConfigError(f"{where} is of another version of clip-deploy ({error}): {way_out}") from None
    return found


def _parsed(kind: Any, content: Any, at: str, null_is_nan: bool) -> Any:
    if kind is Any:
        return content
    if kind is float and content is None and null_is_nan:
        return nan
    if get_origin(kind) in (Union, UnionType):
        return _one_of(get_args(kind), content, at, null_is_nan)
    if get_origin(kind) in (dict, Mapping, list, tuple):
        return _collection(kind, content, at, null_is_nan)
    if is_dataclass(kind) and isinstance(content, dict):
        return _record(kind, content, at, null_is_nan)
    if kind is float and type(content) is int:
        return float(content)
    if isinstance(kind, type) and issubclass(kind, Enum) and content in [item.value for item in kind]:
        return kind(content)
    if type(content) is not kind:
        raise UnlikeError(f"{at or 'it'} is {_shown(content)}, not {_named(kind)}")
    return content


def _one_of(kinds: tuple[Any, ...], content: Any, at: str, null_is_nan: bool) -> Any:
    if content is None and NoneType in kinds and not (null_is_nan and float in kinds):
        return None
    faults = []
    for kind in kinds:
        try:
            return _parsed(kind, content, at, null_is_nan)
        except UnlikeError as error:
            faults.append(error)
    raise faults[0]


def _collection(kind: Any, content: Any, at: str, null_is_nan: bool) -> Any:
    origin, kinds = get_origin(kind), get_args(kind)
    if origin in (dict, Mapping):
        if not isinstance(content, dict):
            raise UnlikeError(f"{at or 'it'} is {_shown(content)}, not a dictionary")
        inner = {key: _parsed(kinds[1], item, _below(at, key), null_is_nan) for key, item in content.items()}
        return {_key(kinds[0], key, at): item for key, item in inner.items()}
    if not isinstance(content, list):
        raise UnlikeError(f"{at or 'it'} is {_shown(content)}, not a list")
    if origin is list or kinds[1:] == (...,):
        kinds = (kinds[0],) * len(content)
    if len(kinds) != len(content):
        raise UnlikeError(f"{at or 'it'} has {len(content)} entries, not {len(kinds)}")
    pairs = enumerate(zip(kinds, content, strict=True))
    return origin(_parsed(each, item, _below(at, str(row)), null_is_nan) for row, (each, item) in pairs)


def _key(kind: Any, key: str, at: str) -> Any:
    try:
        return kind(key)
    except ValueError:
        raise UnlikeError(f"{at or 'it'} has an entry {key}, which is not {_named(kind)}") from None


def _record(kind: Any, content: dict[str, Any], at: str, null_is_nan: bool) -> Any:
    if unknown := [key for key in content if key not in _entries(kind)]:
        raise UnlikeError(f"it has an unknown entry {_below(at, unknown[0])}")
    given, types = {}, _types(kind)
    for item in fields(kind):
        if item.metadata.get("flat"):
            given[item.name] = _flat(item, _inner(types[item.name]), content, at, null_is_nan)
        elif item.name in content:
            given[item.name] = _parsed(types[item.name], content[item.name], _below(at, item.name), null_is_nan)
        elif _is_required(item):
            raise UnlikeError(f"it lacks {_below(at, item.name)}")
    return kind(**given)


def _flat(item: "Field[Any]", kind: Any, content: dict[str, Any], at: str, null_is_nan: bool) -> Any:
    """What stands among the entries of the dataclass around it; None where nothing of it does and nothing must."""
    known = {key: entry for key, entry in content.items() if key in _entries(kind)}
    return _record(kind, known, at, null_is_nan) if known or _is_required(item) else None


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _entries(kind: Any) -> frozenset[str]:
    """The entries that a dataclass has in a file."""
    types = _types(kind)
    inner = [_entries(_inner(types[item.name])) for item in fields(kind) if item.metadata.get("flat")]
    return frozenset({item.name for item in fields(kind) if not item.metadata.get("flat")}.union(*inner))


def _inner(kind: Any) -> Any:
    """The dataclass of a flat field, which may be None."""
    return next(each for each in (*get_args(kind), kind) if is_dataclass(each))


def _is_required(item: "Field[Any]") -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _below(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def _shown(content: Any) -> str:
    kinds = {dict: "a dictionary", list: "a list", NoneType: "null"}
    return kinds.get(type(content)) or f"{content!r:.80}"


def _named(kind: Any) -> str:
    return "a dictionary" if is_dataclass(kind) else str(getattr(kind, "__name__", kind))


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries for JSON, without what is None or empty where nothing is said."""
    if is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for item in fields(value):
            held = getattr(value, item.name)
            if not _is_unsaid(item, held):
                found |= plain(held) if item.metadata.get("flat") else {item.name: plain(held)}
        return found
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _is_unsaid(item: "Field[Any]", held: Any) -> bool:
    if item.default_factory is not MISSING:
        return bool(held == item.default_factory())
    return item.default is None and held is None
