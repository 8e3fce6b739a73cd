"""Check params.yaml and conf/ whole, then write what machine and libraries these are. Runs first and always."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clip_deploy.core.config import load_choice, load_params
from clip_deploy.core.environment import fingerprint, hardware, software
from clip_deploy.core.errors import ConfigError
from clip_deploy.core.results import write_json
from clip_deploy.serving.server import versions
from stages import CONF, PARAMS, stage


@dataclass
class Settings:
    output: Path = MISSING
    inputs: Path = MISSING  # what the checkpoint, the data and the Triton server are, where they lie on this disk


@stage
def probe(settings: Settings) -> None:
    params = load_params(PARAMS, CONF)
    inputs = {group: identity(group, getattr(params, group)) for group in ("model", "data")}
    found = versions(Path(params.triton_check.environment))
    inputs["triton"] = ", ".join(f"{name} {version}" for name, version in found.items()) or "no server"
    write_json(settings.inputs, inputs)
    write_json(settings.output, {"software": software(), "hardware": hardware()})


def identity(group: str, choice: str) -> str:
    """What a local checkpoint or data set holds, so that DVC sees it change."""
    name = load_choice(CONF, group, choice).path
    if not name:
        return "not local"
    path = Path(name).expanduser()
    if not path.exists():
        raise ConfigError(f"{group}.path is {name}: no such file or folder; set it in conf/{group}/{choice}.yaml")
    return fingerprint(path)


if __name__ == "__main__":
    probe()
