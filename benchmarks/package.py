"""Hold packages against their rows of the table: python -m benchmarks.package [target...]

Packages each target (default: all that passed) as `clip-deploy package` does, opens it beside the target's own folder,
and times both on the same arrays in memory, turn by turn, at the batch that gives most per second. That in several
pairs of processes: one process of OpenVINO's INT8 is up to half as fast again as another. Prints a line each and writes
reports/package.json.
"""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clip_deploy.core.artifact import TOWERS, read_target
from clip_deploy.core.config import BenchmarkConfig
from clip_deploy.core.environment import cores, hardware
from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import write_text
from clip_deploy.core.package import Towers, read_package
from clip_deploy.timing.latency import LatencyWorker, measure_one, shape_request

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "reports" / "package.json"
PROGRAM = (sys.executable, "-m", "benchmarks.package_worker")
SETTINGS = BenchmarkConfig(seconds=1.0, iterations=1000)
PAIRS = 3  # of processes


def main(targets: list[str]) -> None:
    advice = json.loads((ROOT / "reports/recommendation.json").read_text())["targets"]
    chosen = targets or [name for name, verdict in advice.items() if verdict["status"] == "pass"]
    rows = {name: against_row(name) for name in chosen}
    record = {"threads": cores(), "rows": rows, "machine": asdict(hardware())}
    write_text(OUTPUT, json.dumps(record, indent=2) + "\n")


def against_row(target: str) -> dict[str, Any]:
    """By tower: the batch, and the package's rate over the row's: the median over the pairs, the lowest and highest."""
    package = packaged(target)
    towers = read_package(package).encoder.towers
    pairs = [one_pair(package, ROOT / "artifacts" / target, towers) for _ in range(PAIRS)]
    found: dict[str, Any] = {"runtime": towers.vision.runtime}
    for tower in TOWERS:
        rates = sorted(pair[tower] for pair in pairs)
        found[tower] = {"batch": max(towers[tower].batch_sizes), "of_row": rates[PAIRS // 2], "pairs": rates}
        print(
            f"{target}, {tower}: {rates[PAIRS // 2]:.3f} of the row's rate, in pairs of processes {rates}", flush=True
        )
    return found


def packaged(target: str) -> Path:
    """The project's package, where it holds that target; else one made for this."""
    project, package = ROOT / "artifacts" / "package", ROOT / "build" / "packages" / target
    with suppress(DeployError):
        towers = read_package(project).encoder.towers
        if {towers.vision.target, towers.text.target} == {target}:
            return project
    command = [sys.executable, "-m", "clip_deploy", "package", target, "--output", str(package)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(done.stderr.strip())
    return package


def one_pair(package: Path, folder: Path, towers: Towers) -> dict[str, float]:
    """The rates of one pair of processes, by tower."""
    found = {}
    with LatencyWorker(package, cores(), PROGRAM) as opened, LatencyWorker(folder, cores()) as row:
        for worker in (opened, row):
            worker.wait()
        for tower in TOWERS:
            batch = max(towers[tower].batch_sizes)
            asked = shape_request(tower, batch, read_target(folder), SETTINGS) | {"device": "cpu"}  # arrays in memory
            found[tower] = round(measure_one(opened, row, asked, SETTINGS).speedup, 3)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
