"""Where a checkpoint's parts are taken from: its model, the base of an adapter, a processor that it lacks."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_deploy.checkpoint.layout import ADAPTER, is_adapter, read_object
from clip_deploy.core.config import ModelConfig
from clip_deploy.core.environment import located
from clip_deploy.core.errors import CheckpointError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
FILE = "the model's file in conf/model/"


@dataclass(frozen=True)
class Place:
    """A local folder, or a repository of the hub at a revision; `setting` is what names it, `pin` its revision."""

    setting: str
    path: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    pin: str = "revision"

    def __str__(self) -> str:
        return f"{self.repo_id} at {self.revision}" if self.repo_id else str(self.path)


def model_place(model: ModelConfig) -> Place:
    """What `repo_id` or `path` names. Raises CheckpointError where the first is no id of the hub, as a URL is none."""
    if model.repo_id and not HUB_ID.fullmatch(model.repo_id):
        raise CheckpointError(f"model.repo_id is {model.repo_id!r:.120}: give an id of the hub, owner/name")
    return Place("model.path", model.path, model.repo_id, model.revision)


def processor_place(model: ModelConfig) -> Place | None:
    """What `processor` names; None where it is not set."""
    if not model.processor:
        return None
    return _place("model.processor", model.processor, model.processor_revision, "processor_revision")


def base_place(model: ModelConfig, adapter: dict[str, Any]) -> Place:
    """The base of an adapter: what `base` names, or else its adapter_config.json.

    A repository of the hub cannot name a folder of this machine.

    Raises CheckpointError where nothing names one, or names what is neither a folder nor an id with its revision.
    """
    stated = adapter.get("base_model_name_or_path")
    if model.base:
        return _place("model.base", model.base, model.base_revision, "base_revision")
    if not isinstance(stated, str) or not stated:
        raise CheckpointError(
            f"{ADAPTER} names no base (base_model_name_or_path is {stated!r:.40}): set `base:` in {FILE}, a folder or "
            "an id with `base_revision:`"
        )
    known = adapter.get("revision")
    revision = model.base_revision or (known if isinstance(known, str) and COMMIT.fullmatch(known) else None)
    return _place("the adapter's base", stated, revision, "base_revision", local=not model.repo_id)


def _place(setting: str, name: str, revision: str | None, pin: str, local: bool = True) -> Place:
    if local and _is_here(name):
        return Place(setting, path=name)
    way = f"; set `{pin.removesuffix('_revision')}:` in {FILE}, a folder or an id with `{pin}:`"
    if not HUB_ID.fullmatch(name):
        what = "there is no such folder here, and it is not an id of the hub" if local else "it is not an id of the hub"
        raise CheckpointError(f"{setting} is {name!r:.120}: {what}{way}")
    if not revision:
        here = "there is no such folder here, and " if local else ""
        raise CheckpointError(f"{setting} is {name!r:.120}: {here}as an id it is not pinned to a commit{way}")
    return Place(setting, repo_id=name, revision=revision, pin=pin)


def _is_here(name: str) -> bool:
    try:
        return located(name).exists()
    except (OSError, RuntimeError):  # too long a name, or the home of an unknown user
        return False


def local_parts(model: ModelConfig) -> dict[str, Path]:
    """The folders of this disk, besides `path`, whose change makes another checkpoint: "base" and "processor".

    What is wrong with one, `download` says.
    """
    found = {}
    for part, find in (("base", _known_base), ("processor", processor_place)):
        with suppress(CheckpointError):
            place = find(model)
            if place and place.path and located(place.path).is_dir():
                found[part] = located(place.path)
    return found


def _known_base(model: ModelConfig) -> Place | None:
    """The base as far as it is known before anything is fetched."""
    if model.base:
        return base_place(model, {})
    if model.path and is_adapter(located(model.path)):
        return base_place(model, read_object(located(model.path) / ADAPTER))
    return None
