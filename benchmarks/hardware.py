"""Reports of models on this machine: python -m benchmarks.hardware MODEL... (or `make bench-hardware MODELS=...`)

Each MODEL is a name of conf/model/. A copy of the repository in build/hardware/MODEL is set for it and for the device.
benchmarks.side_by_side runs the pipeline there, builds side by side and what is timed alone. The report and what it was
made from then lie in reports/hardware/<GPU or CPU>/MODEL/.

--targets limits the rows, --batch is what recommend.batch becomes, --device is cuda or cpu. Exit code 1 where a stage
failed; the copy stays, and `python -m benchmarks.side_by_side resume=true` in it goes on.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.pipeline import ROOT, copy_project, environment
from clip_deploy.commands.device import choose
from clip_deploy.core.config import BUILDERS, EXPORTED, REFERENCE
from clip_deploy.core.environment import Environment, cores
from clip_deploy.core.files import write_text
from clip_deploy.core.parsing import read_record

WORK = ROOT / "build" / "hardware"
RESULTS = ROOT / "reports" / "hardware"
KEPT = ("report.md", "report.html", "environment.json", "recommendation.json", "targets.json")
CORES = 4  # of a stage that builds


def main(given: argparse.Namespace) -> int:
    failed = 0
    for model in given.models:
        project = prepared(model, given)
        command = [sys.executable, "-m", "benchmarks.side_by_side", f"jobs={max(1, cores() // CORES)}"]
        path = os.pathsep.join([str(project), os.environ.get("PYTHONPATH", "")])
        failed |= subprocess.run(command, cwd=project, env=environment() | {"PYTHONPATH": path}, check=False).returncode
        if (project / "reports" / KEPT[0]).exists():
            print(keep(project, model))
    return 1 if failed else 0


def prepared(model: str, given: argparse.Namespace) -> Path:
    """A copy of the repository that is set for the model, the device and the rows."""
    project = WORK / model
    shutil.rmtree(project, ignore_errors=True)
    copy_project(project)
    params = project / "params.yaml"
    choose(given.device, params, project / "conf" / "devices", discard=True)
    settings = yaml.safe_load(params.read_text())
    settings["model"], settings["recommend"]["batch"] = model, given.batch
    if given.targets:
        limit(settings, given.targets.split(","))
    write_text(params, yaml.safe_dump(settings, sort_keys=False))
    return project


def limit(settings: dict[str, Any], names: list[str]) -> None:
    """Leave out of params.yaml what none of these targets needs."""
    built = {name: chosen for section in BUILDERS for name, chosen in settings[section].items()}
    if lost := sorted(set(names) - {REFERENCE, EXPORTED, *built}):
        sys.exit(f"error: --targets names {lost[0]}, which is not built on this device: known are {', '.join(built)}")
    needed = {*names, *(built[name]["source"] for name in names if "source" in built.get(name, {}))}
    for section in BUILDERS:
        settings[section] = {name: chosen for name, chosen in settings[section].items() if name in needed}
    rows = list(dict.fromkeys([REFERENCE, *names]))
    settings["targets"] = rows
    settings["ci"]["required"] = [name for name in settings["ci"]["required"] if name in rows]
    settings["end_to_end"]["targets"] = [name for name in settings["end_to_end"]["targets"] if name in rows]


def keep(project: Path, model: str) -> Path:
    """Put the report and its sources where the reports of machines are."""
    hardware = read_record(Environment, project / "reports" / "environment.json", null_is_nan=False).hardware
    name = hardware.gpus[0].split(",")[0] if hardware.gpus else hardware.cpu
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") / model
    folder.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copy2(project / "reports" / file, folder / file)
    return folder


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names of conf/model/")
    parser.add_argument("--targets", help="rows besides torch-fp32, with commas between")
    parser.add_argument("--batch", type=int, default=1, help="what recommend.batch is set to")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(arguments()))
