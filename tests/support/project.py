"""This repository, and a temporary copy of it in which the pipeline runs."""

import atexit
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "assets" / "tiny-shapes"
PYTHONPATH = os.environ.get("PYTHONPATH", "")  # as no test has changed it yet


@cache
def programs() -> str:
    """PATH of `python`, `dvc` and `clip-deploy`: on Linux those of warm.py, whose process ends with this one."""
    installed = Path(sys.executable).parent
    if sys.platform != "linux":
        return str(installed)
    folder = Path(tempfile.mkdtemp())
    warm, address = str(ROOT / "tests" / "support" / "warm.py"), str(folder / "socket")
    for name in ("python", "dvc", "clip-deploy"):
        words = shlex.join([sys.executable, "-IS", warm, "ask", address, PYTHONPATH, name])
        (folder / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (folder / name).chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, warm, "serve", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    atexit.register(server.communicate)
    assert server.stdout.readline() == b"ready\n"
    return f"{folder}{os.pathsep}{installed}"


def warm_python() -> str:
    """A `python` whose stages, commands and programs in -c start with their libraries imported."""
    return f"{programs().partition(os.pathsep)[0]}/python"


@dataclass
class Project:
    """A copy of this repository with its own git and DVC, three rows less, small sets and short timings."""

    path: Path

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "PATH": programs() + os.pathsep + os.environ["PATH"],
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@example.com",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@example.com",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if command[0] == sys.executable:
            command = ("python", *command[1:])  # which may be warm
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, env=environment, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        return done

    def repro(self, *arguments: str) -> set[str]:
        """Run `dvc repro` and return the stages that ran, without probe, which always does."""
        ran = re.findall(r"Running stage '([^']+)'", self.run("dvc", "repro", *arguments).stdout)
        return set(ran) - {"probe"}

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.path / name).read_text()
        assert old in text, f"{name} has no {old!r}"
        (self.path / name).write_text(text.replace(old, new))

    def lock(self) -> dict:
        """The stages of dvc.lock, by libyaml: by PyYAML's Python it takes ten times as long."""
        return yaml.load((self.path / "dvc.lock").read_text(), yaml.CSafeLoader)["stages"]

    def drop(self, target: str) -> None:
        """Take a target out of params.yaml."""
        path = self.path / "params.yaml"
        built = rf"^  {target}:.*\n(    .*\n)*"
        path.write_text(re.sub(rf"{built}|^ *- {target}\n", "", path.read_text(), flags=re.MULTILINE))

    def copy(self, path: Path) -> "Project":
        shutil.copytree(self.path, path, symlinks=True)
        return Project(path)


def new_project(path: Path) -> Project:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)
    shutil.rmtree(path / "reports", ignore_errors=True)
    (path / "dvc.lock").unlink(missing_ok=True)
    project = Project(path)
    for left_out in ("torchscript-bf16", "openvino-bf16", "openvino-int8"):
        project.drop(left_out)
    project.edit("conf/data/shapes.yaml", "evaluation_samples: 960", "evaluation_samples: 96")
    project.edit("conf/data/shapes.yaml", "calibration_samples: 96", "calibration_samples: 16")
    project.edit("params.yaml", "benchmark: standard", "benchmark: quick")
    project.edit("conf/benchmark/quick.yaml", "- 1\n- 8\n", "- 1\n")
    project.edit("conf/benchmark/quick.yaml", "threads: 2", "threads: 1")
    project.run("git", "init", "-q", "-b", "main")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "Start")
    return project
