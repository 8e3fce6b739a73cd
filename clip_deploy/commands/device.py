"""Choose the device: write its targets and their settings into params.yaml.

The settings of a device stand at the end of params.yaml, from the line `device:` on, because DVC cannot choose a list
by another setting. This command replaces them with the lines of conf/devices/<device>.yaml. If you changed the present
lines, it stops until you give --keep or --discard.

examples: clip-deploy device cuda
          clip-deploy device cuda --keep       # first saves the CPU's lines in conf/devices/cpu.yaml
          clip-deploy device cuda --discard
"""

import argparse
import re
from pathlib import Path

from clip_deploy.commands.project import CONF, PARAMS, check_project
from clip_deploy.core.errors import ConfigError
from clip_deploy.core.files import write_text

LINE = re.compile(r"^device: *(\w+).*$", re.MULTILINE)
DEVICES = CONF / "devices"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="cpu or cuda, or another file of conf/devices/")
    edits = parser.add_mutually_exclusive_group()
    edits.add_argument("--keep", action="store_true", help="save the present lines in conf/devices/ first")
    edits.add_argument("--discard", action="store_true", help="drop what was changed in the present lines")


def run(given: argparse.Namespace) -> int:
    check_project(PARAMS, DEVICES)
    print(choose(given.device, PARAMS, DEVICES, given.keep, given.discard))
    return 0


def choose(device: str, params: Path, devices: Path, keep: bool = False, discard: bool = False) -> str:
    """Write the device's lines into params.yaml; return what to say of it.

    Raises ConfigError where the device is unknown, or the present lines are in no file and neither flag is given.
    """
    files = {path.stem: path for path in sorted(devices.glob("*.yaml"))}
    if device not in files:
        raise ConfigError(f"device is {device!r}: accepted are {', '.join(files)}")
    shared, present, lines = _parted(params)
    saved = lines in [path.read_text(encoding="utf-8") for path in files.values()]
    if present == device and (saved or not (keep or discard)):
        return f"{params} is set for {device} already"
    if not saved and not keep and not discard:
        raise ConfigError(
            f"{params} has lines for {present} that differ from {devices / present}.yaml and would be lost: --keep "
            "saves them there first, --discard drops them"
        )
    kept = ""
    if not saved and keep:
        write_text(devices / f"{present}.yaml", lines)
        kept = f"; what it held for {present} is in {devices / present}.yaml"
    write_text(params, shared + files[device].read_text(encoding="utf-8"))
    return f"{params} is set for {device}{kept}"


def _parted(params: Path) -> tuple[str, str, str]:
    """What both devices share, the present device, and its lines."""
    text = params.read_text(encoding="utf-8")
    line = LINE.search(text)
    if line is None:
        raise ConfigError(f"{params} has no line `device: cpu` or `device: cuda`: put it back, in front of the targets")
    return text[: line.start()], line[1], text[line.start() :]
