"""Time the pipeline itself on this machine: python -m benchmarks.pipeline (or `make bench-pipeline`)

In a temporary copy of the repository, with the settings of params.yaml: a full `dvc repro`, a no-op, an opset change;
then the peak memory of exporting vit-b-32-untrained. Prints one line each and writes reports/pipeline.json.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "reports" / "pipeline.json"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(Path(folder) / "project")
        record = {
            "full_repro_s": seconds(project, "dvc", "repro"),
            "no_op_s": min(seconds(project, "dvc", "repro") for _ in range(3)),
        }
        params = project / "params.yaml"
        params.write_text(re.sub(r"(?m)^  opset: \d+", "  opset: 20", params.read_text()))
        record["opset_change_s"] = seconds(project, "dvc", "repro")
        record["export_vit_b_32_peak_mb"] = export_peak_mb(project)
        record["machine"] = json.loads((project / "reports/environment.json").read_text())["hardware"]
    for name, value in record.items():
        print(f"{name}: {value}")
    OUTPUT.write_text(json.dumps(record, indent=2) + "\n")


def copy_project(path: Path) -> Path:
    """A clone of the working tree with nothing built."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("reports/") and name != "dvc.lock":
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)
    subprocess.run(["git", "init", "-q"], cwd=path, check=True)
    return path


def seconds(project: Path, *command: str) -> float:
    started = time.monotonic()
    subprocess.run(command, cwd=project, check=True, stdout=subprocess.DEVNULL, env=environment())
    return round(time.monotonic() - started, 2)


def export_peak_mb(project: Path) -> float:
    """Highest resident memory of the export_onnx stage on the B/32 architecture."""
    stages = [sys.executable, "-m"]
    subprocess.run(
        [*stages, "stages.download", "model=vit-b-32-untrained", "output=artifacts/b-32"],
        cwd=project,
        check=True,
    )
    command = [*stages, "stages.export_onnx", "source=artifacts/b-32", "output=artifacts/b-32-onnx"]
    process = subprocess.Popen(command, cwd=project, env=environment())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("exporting vit-b-32-untrained failed")
    scale = 1 if sys.platform == "darwin" else 1024
    return round(usage.ru_maxrss * scale / 1e6)


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


if __name__ == "__main__":
    main()
