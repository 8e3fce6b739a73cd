"""Put two machines, or two runs on one, side by side, as a Markdown table on standard output.

usage: python -m stages.compare REPORTS_A REPORTS_B      (two reports folders; no stage of the pipeline, no settings)
"""

import sys
from pathlib import Path

from clip_deploy.core.errors import DeployError, quiet_if_unread
from clip_deploy.report.compare import comparison, read_run


@quiet_if_unread()
def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(arguments) != 2:
        wanted = "usage: python -m stages.compare REPORTS_A REPORTS_B"
        print(f"{wanted}: two folders are needed, {len(arguments)} given", file=sys.stderr)
        return 2
    try:
        first, second = (read_run(Path(folder)) for folder in arguments)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(comparison(first, second))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
