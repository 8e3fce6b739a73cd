"""Hold a folder's files against its manifest: is it what was built and judged?

usage: python -m stages.verify FOLDER      (no stage of the pipeline, no settings)

FOLDER is a target's (artifacts/ort-fp32, with ort-fp32.manifest.json beside it), artifacts/package or artifacts/triton.
Exit code 0: every file is there and unchanged, and none was added; 1: each difference, or why it cannot be told.
"""

import sys
from pathlib import Path

from clip_deploy.core.errors import DeployError
from clip_deploy.verify import described, verify


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
    print(*(f"{arguments[0]}/{difference}" for difference in found), sep="\n", end="\n" if found else "")
    print(f"{arguments[0]}: {'not what its manifest says' if found else described(manifest)}")
    return 1 if found or "files" not in manifest else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
