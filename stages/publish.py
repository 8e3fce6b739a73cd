"""Add Triton's models as the next version to a repository that is served, or take a version back.

usage: python -m stages.publish REPOSITORY SERVED [URL]        (no stage of the pipeline, no settings)
       python -m stages.publish --withdraw VERSION SERVED [URL]

REPOSITORY is artifacts/triton/onnxruntime or artifacts/triton/python, SERVED the copy of one that a server reads, URL
its HTTP port (http://localhost:8000), through which it loads the version at once; without, it does at its next start.
Exit code 0: done; 1: why not, and nothing has changed.
"""

import sys
from pathlib import Path

from clip_deploy.core.errors import DeployError, quiet_if_unread
from clip_deploy.serving.publish import publish, withdraw

USAGE = "usage: python -m stages.publish [--withdraw VERSION | REPOSITORY] SERVED [URL]"


@quiet_if_unread()
def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    back = arguments[:1] == ["--withdraw"]
    given = arguments[1:] if back else arguments
    if len(given) not in (2, 3):
        print(f"{USAGE}: {len(given)} given", file=sys.stderr)
        return 2
    subject, served, url = given[0], Path(given[1]), given[2].rstrip("/") if len(given) == 3 else None
    try:
        version = withdraw(served, subject, url) if back else publish(Path(subject), served, url)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{served}: version {version} is the newest" + ("" if url else "; a server takes it at its next start"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
