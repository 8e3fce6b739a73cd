"""Hold packages against their rows of the table: python -m benchmarks.package [target...]

Packages each target (default: all that passed) as `clip-deploy package` does, opens it beside the target's own folder,
and times both on the same arrays in memory, turn by turn, at the batch that gives most per second. Prints a line each
and writes reports/package.json.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clip_deploy.core.artifact import TOWERS, read_target
from clip_deploy.core.config import BenchmarkConfig
from clip_deploy.core.environment import cores, hardware
from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import write_text
from clip_deploy.core.package import read_package
from clip_deploy.timing.latency import LatencyWorker, measure_one, shape_request

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "reports" / "package.json"
PROGRAM = (sys.executable, "-m", "benchmarks.package_worker")
SETTINGS = BenchmarkConfig(seconds=3.0, iterations=1000)


def main(targets: list[str]) -> None:
    advice = json.loads((ROOT / "reports/recommendation.json").read_text())["targets"]
    chosen = targets or [name for name, verdict in advice.items() if verdict["status"] == "pass"]
    rows = {name: against_row(name) for name in chosen}
    record = {"threads": cores(), "rows": rows, "machine": asdict(hardware())}
    write_text(OUTPUT, json.dumps(record, indent=2) + "\n")


def against_row(target: str) -> dict[str, Any]:
    """By tower: the batch, and the package's rate over the row's with its 95 % interval."""
    package = ROOT / "build" / "packages" / target
    command = [sys.executable, "-m", "clip_deploy", "package", target, "--output", str(package)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(done.stderr.strip())
    encoder, folder = read_package(package).encoder, ROOT / "artifacts" / target
    found: dict[str, Any] = {"runtime": encoder.towers.vision.runtime}
    with LatencyWorker(package, cores(), PROGRAM) as opened, LatencyWorker(folder, cores()) as row:
        for worker in (opened, row):
            worker.wait()
        for tower in TOWERS:
            batch = max(encoder.towers[tower].batch_sizes)
            asked = shape_request(tower, batch, read_target(folder), SETTINGS) | {"device": "cpu"}  # arrays in memory
            timing = measure_one(opened, row, asked, SETTINGS)
            rate, low, high = timing.speedup, timing.speedup_low, timing.speedup_high
            found[tower] = {"batch": batch, "of_row": round(rate, 3), "low": round(low, 3), "high": round(high, 3)}
            print(f"{target}, {tower}, batch {batch}: {rate:.3f} of the row's rate [{low:.3f}, {high:.3f}]", flush=True)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
