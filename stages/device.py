"""Choose the device: python -m stages.device cuda

usage: python -m stages.device cpu|cuda      (no stage of the pipeline, no settings)

DVC cannot look a list up by another setting's value, so all that goes with the device (targets, and how each is built)
stands at the end of params.yaml. This puts the other device's lines there and keeps the present ones in conf/devices/.
"""

import re
import sys
from pathlib import Path

from clip_deploy.core.errors import ConfigError, DeployError, quiet_if_unread
from clip_deploy.core.files import write_text
from stages import PARAMS

LINE = re.compile(r"^device: *(\w+).*$", re.MULTILINE)


def choose(device: str, params: Path, conf: Path) -> str:
    """Swap the end of params.yaml, from its line `device:` on, with conf/<device>.yaml; return what to say of it."""
    text = params.read_text(encoding="utf-8")
    line = LINE.search(text)
    if line is None:
        raise ConfigError(f"{params} has no line `device: cpu` or `device: cuda`: put it back, in front of the targets")
    other = conf / f"{device}.yaml"
    if line[1] == device:
        return f"{params} is set for {device} already"
    if not other.is_file():
        known = ", ".join(sorted({line[1], *(path.stem for path in conf.glob("*.yaml"))}))
        raise ConfigError(f"device is {device!r}: accepted are {known}")
    write_text(conf / f"{line[1]}.yaml", text[line.start() :])
    write_text(params, text[: line.start()] + other.read_text(encoding="utf-8"))
    other.unlink()
    return f"{params} is set for {device}; what it held for {line[1]} is in {conf / line[1]}.yaml"


@quiet_if_unread()
def main() -> None:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(sys.argv) != 2:
        sys.exit("usage: python -m stages.device cpu|cuda")
    try:
        print(choose(sys.argv[1], PARAMS, Path("conf/devices")))
    except DeployError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
