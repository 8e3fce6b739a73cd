"""Check params.yaml and conf/ whole, then write what machine and libraries these are. Runs first and always."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.checkpoint.places import local_parts
from clip_deploy.checkpoint.sentence_transformers import read_here
from clip_deploy.core.config import load_choice, load_params
from clip_deploy.core.environment import environment_record, fingerprint_input, located
from clip_deploy.core.errors import ConfigError
from clip_deploy.core.json_files import write_json
from clip_deploy.serving.server import versions
from stages import CONF, PARAMS, stage


@dataclass
class Settings:
    output: Path = MISSING
    inputs: Path = MISSING  # what the checkpoint, the data and the Triton server are, where they lie on this disk


@stage
def probe(settings: Settings) -> None:
    for path, found in zip((settings.output, settings.inputs), probed(), strict=True):
        write_json(path, found)


def probed() -> tuple[dict[str, object], dict[str, object]]:
    """What environment.json and inputs.json would hold now; ConfigError where a setting is refused."""
    params = load_params(PARAMS, CONF)
    inputs: dict[str, object] = {group: identity(group, getattr(params, group)) for group in ("model", "data")}
    server = ", ".join(f"{name} {of}" for name, of in versions(located(params.triton_check.environment)).items())
    return environment_record(), inputs | {"triton": server or "no server"}


def identity(group: str, choice: str) -> str:
    """What a local checkpoint or data set holds, so that DVC sees it change."""
    settings = load_choice(CONF, group, choice)
    path = located(name := settings.path or getattr(settings, "dataset_id", None) or "")  # which may be a folder too
    others = local_parts(settings) if group == "model" else {}
    parts = [f"{part} {fingerprint_input(folder, settings, read_here(folder))}" for part, folder in others.items()]
    if not settings.path and not (name and path.is_dir()):
        return ", ".join(["not local", *parts])
    if not path.exists():
        raise ConfigError(f"{group}.path is {name}: no such file or folder; set it in conf/{group}/{choice}.yaml")
    names = read_here(path) if group == "model" and path.is_dir() else None
    return ", ".join([fingerprint_input(path, settings, names), *parts])


if __name__ == "__main__":
    probe()
