"""Our own targets of the benchmarked model, built by the pipeline itself in a copy of the repository."""

import re
import subprocess
from pathlib import Path

from benchmarks.pipeline import copy_project, environment
from clip_deploy.core.config import EXPORTED, REFERENCE, read_yaml
from clip_deploy.core.errors import ConfigError

SECTIONS = ("export_torchscript", "export_aoti", "export_openvino", "optimize", "quantize")  # each named as its stage


def build_targets(model: str, targets: list[str], folder: Path) -> Path:
    """Run the stages that build `targets` with `model`; the copy's artifacts/. Unchanged ones are not built again."""
    copy_project(folder)
    params = folder / "params.yaml"
    stages = [stage_of(target, params) for target in targets]
    params.write_text(re.sub(r"(?m)^model: *[^ \n]+", f"model: {model}", params.read_text(), count=1))
    subprocess.run(["dvc", "repro", *stages], cwd=folder, check=True, env=environment())
    return folder / "artifacts"


def stage_of(target: str, params: Path) -> str:
    """The DVC stage that builds a target, as params.yaml places it."""
    if target in (REFERENCE, EXPORTED):
        return "download" if target == REFERENCE else "export_onnx"
    content = read_yaml(params)
    for section in SECTIONS:
        if target in content.get(section, {}):
            return f"{section}@{target}"
    known = [REFERENCE, EXPORTED, *(name for section in SECTIONS for name in content.get(section, {}))]
    raise ConfigError(f"targets names {target!r}: params.yaml builds {', '.join(known)}")
