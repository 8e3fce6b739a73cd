"""Why stages run again: what changed (old -> new), the stages that read it, and those behind them, as a tree."""

import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from clip_deploy.core.artifact import MANIFEST_NAME
from clip_deploy.core.errors import ConfigError

Settings = dict[str, dict[str, Any]]  # file: {key, dotted or not: value}
WIDTH = 116  # characters of a line
MODELS = "artifacts/"
MANIFEST = MANIFEST_NAME.format("")
ALWAYS = "probe"  # it runs every time: no reason for anything
LOST = ": not in cache"  # what DVC says of what a stage wrote, where neither the project nor the cache has it


@dataclass
class Stage:
    """What DVC knows of one stage.

    Attributes:
        before: the stages whose outputs it reads.
        outs: the paths that it writes.
        old, new: the settings and versions that it reads, as it last ran and now.
        files: files that changed since it last ran, and what DVC calls that: {path: "modified", "deleted" or "new"}.
        is_new: it never ran.
        is_cached: all that it reads is as it was, and DVC's cache holds what it wrote.
        has_run: it ran between the two states that are compared; None where the run is still to come.
    """

    before: set[str]
    outs: list[str]
    old: Settings = field(default_factory=dict)
    new: Settings = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    is_new: bool = False
    is_cached: bool = False
    has_run: bool | None = None


def explain(stages: dict[str, Stage], target: str | None = None) -> str:
    """Every cause with the stages that it concerns, those behind them indented below; for one target, or for all.

    Raises ConfigError where `target` is neither a target nor a stage.
    """
    shown = set(stages) - {ALWAYS} if target is None else _line_of(stages, target)
    ends = shown if target is None else _ends(stages, target)
    concerning = {cause: names for cause, names in causes(stages).items() if behind(stages, names) & ends}
    trees: dict[str, list[str]] = {}
    for cause, concerned in _lost_together(concerning).items():
        trees.setdefault("\n".join(_tree(stages, behind(stages, concerned) & shown)), []).append(cause)
    if not trees:
        return f"nothing changed{f' for {target}' if target else ''}: only {ALWAYS} runs, as it always does"
    return "\n\n".join("\n".join([*lines, tree]) for tree, lines in trees.items())


def _lost_together(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """The causes, all that is lost as one of them: in a new clone that is every model."""
    lost = [cause for cause in found if cause.endswith(LOST)]
    if len(lost) < 2:
        return found
    paths = [cause.removesuffix(LOST) for cause in lost]
    shown = [path for path in paths if path.removesuffix(MANIFEST) not in set(paths) - {path}]
    line = f"not in DVC's cache (`dvc pull` fetches what a remote has): {', '.join(shown)}"
    joined = textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    others = {cause: names for cause, names in found.items() if cause not in lost}
    return {joined: set().union(*(found[cause] for cause in lost))} | others


def causes(stages: dict[str, Stage]) -> dict[str, set[str]]:
    """What changed by itself, not because another stage runs: {a line that says it: the stages that it concerns}."""
    changes = [(name, path, line) for name, stage in stages.items() for path, line in _changes(stage)]
    writers = {path: _writers(stages, path) for _, path, _ in changes}
    running = behind(stages, [name for name, path, _ in changes if not writers[path] - {name}])
    found: dict[str, set[str]] = {}
    for name, path, line in changes:  # where no writer runs, a model changed by itself: by hand, or its stage ran alone
        if not writers[path] - {name} or not writers[path] & running:
            found.setdefault(line, set()).add(name)
    return found


def _changes(stage: Stage) -> Iterator[tuple[str, str]]:
    """Each file that changed, or settings in it, and the line that says so."""
    if stage.is_new:
        yield "dvc.lock", "not in dvc.lock: never run"
        return
    for file in stage.new:
        if file not in stage.old:
            yield file, f"{file}: read now"
            continue
        for line in changed(stage.old[file], stage.new[file], file):
            yield file, line
    for path, word in stage.files.items():
        back = ", and taken back from DVC's cache" if path in stage.outs and stage.is_cached else ""
        yield path, f"{path}: {word}{back}"


def _writers(stages: dict[str, Stage], path: str) -> set[str]:
    """The stages that write `path`, something in it, or the folder that it lies in."""
    return {
        name
        for name, stage in stages.items()
        if name != ALWAYS and any(f"{out}/".startswith(f"{path}/") or path.startswith(f"{out}/") for out in stage.outs)
    }


def changed(old: dict[str, Any], new: dict[str, Any], file: str) -> Iterator[str]:
    """Each setting of a file that is another now, as "onnx.opset: 18 -> 20  (params.yaml)"."""
    was, now = dict(_flat(old)), dict(_flat(new))
    for key in dict.fromkeys([*was, *now]):
        if was.get(key) != now.get(key):
            yield f"{key}: {_step(was.get(key), now.get(key))}  ({file})"


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _step(old: Any, new: Any) -> str:
    """Old -> new; of lists, what came and what went."""
    if isinstance(old, list) and isinstance(new, list):
        came = [f"+{_said(item)}" for item in new if item not in old]
        return ", ".join(came + [f"-{_said(item)}" for item in old if item not in new]) or "another order"
    return f"{_said(old)} -> {_said(new)}"


def _said(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def behind(stages: dict[str, Stage], concerned: Iterable[str]) -> set[str]:
    """These stages and all behind them that run; what comes back from the cache changes nothing behind it."""
    found = set(concerned)
    while more := {
        name
        for name, stage in stages.items()
        if name not in found and any(other in found and not stages[other].is_cached for other in stage.before)
    }:
        found |= more
    return {name for name in found if stages[name].has_run is not False}


def _ends(stages: dict[str, Stage], target: str) -> set[str]:
    """The stages that build, check and time a target, or that have this name."""
    ends = {
        name
        for name, stage in stages.items()
        if target in (name, *name.split("@")) or f"{MODELS}{target}" in stage.outs
    }
    if not ends:
        built = [out.removeprefix(MODELS) for stage in stages.values() for out in stage.outs if out.startswith(MODELS)]
        known = [name for name in built if re.fullmatch("[a-z0-9-]+", name)]  # data/... and manifests are no targets
        names = dict.fromkeys(name.split("@")[0] for name in stages)
        raise ConfigError(f"target is {target!r}: accepted are {', '.join(known)}, and stages: {', '.join(names)}")
    return ends


def _line_of(stages: dict[str, Stage], target: str) -> set[str]:
    """The stages of a target, and all before them."""
    found = _ends(stages, target)
    while more := set().union(*(stages[name].before for name in found)) - found:
        found |= more
    return found - {ALWAYS}


def _tree(stages: dict[str, Stage], affected: set[str]) -> list[str]:
    """Models, each below the one that it is built from; then what is measured and what is gathered."""
    models = [name for name in stages if name in affected and _is_model(stages, name)]
    return [*_branch(stages, models, None, "  "), *_rest([name for name in stages if name in affected - set(models)])]


def _branch(stages: dict[str, Stage], models: list[str], above: str | None, indent: str) -> Iterator[str]:
    for name in models:
        if max(stages[name].before & set(models), key=partial(_depth, stages), default=None) == above:
            yield f"{indent}{name} -> {', '.join(out.removeprefix(MODELS) for out in stages[name].outs)}"
            yield from _branch(stages, models, name, indent + "  ")


def _is_model(stages: dict[str, Stage], name: str) -> bool:
    """Whether it is built before anything is measured."""
    stage = stages[name]
    return all(out.startswith(MODELS) for out in stage.outs) and all(
        _is_model(stages, other) for other in stage.before - {ALWAYS}
    )


def _depth(stages: dict[str, Stage], name: str) -> int:
    return 1 + max((_depth(stages, other) for other in stages[name].before), default=0)


def _rest(names: list[str]) -> Iterator[str]:
    """`validate@a, validate@b, benchmark@a, benchmark@b, report` as "validate, benchmark: a, b" and "report"."""
    keys: dict[str, list[str]] = {}
    for name in names:
        group, _, key = name.partition("@")
        keys.setdefault(group, []).append(key)
    lines: dict[str, list[str]] = {}
    for group, found in keys.items():
        lines.setdefault(", ".join(filter(None, found)), []).append(group)
    for targets, groups in lines.items():
        text = f"{', '.join(groups)}: {targets}" if targets else ", ".join(groups)
        yield textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
