"""Hold a folder's files against its manifest: is it what was built and judged?

usage: python -m stages.verify FOLDER      (no stage of the pipeline, no settings)

FOLDER is a target's (artifacts/ort-fp32, with ort-fp32.manifest.json beside it), artifacts/package or artifacts/triton.
Exit code 0: every file is there and unchanged, and none was added; 1: each difference, or why it cannot be told.
"""

import sys
from pathlib import Path

from clip_deploy.core.errors import DeployError, quiet_if_unread
from clip_deploy.core.manifest import described, verify


@quiet_if_unread()
def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(arguments) != 1:
        wanted = "usage: python -m stages.verify FOLDER"
        print(f"{wanted}: one folder is needed, {len(arguments)} given", file=sys.stderr)
        return 2
    try:
        manifest, found = verify(Path(arguments[0]))
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for difference in found:
        print(f"{arguments[0]}/{printable(difference)}")
    print(f"{arguments[0]}: {'not what its manifest says' if found else printable(described(manifest))}")
    return 1 if found or "unavailable" in manifest else 0


def printable(text: str) -> str:
    """In one line, and without what a terminal obeys: a manifest may come from anywhere."""
    return text if text.isprintable() else ascii(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
