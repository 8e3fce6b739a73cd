"""Compare machines, or runs on one machine, in a Markdown table.

What is compared is a reports folder, copied here from another machine, or reports/ of this repository at a git revision
or in one of DVC's experiments.

examples: clip-deploy compare reports reports-of-the-xeon > both.md
          clip-deploy compare main HEAD tidal-hoes
"""

import argparse
from string import ascii_uppercase as LETTERS

from clip_deploy.core.errors import DeployError
from clip_deploy.report.compare import comparison, read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    said = "a reports folder, a git revision, or the name of a DVC experiment"
    parser.add_argument("first", metavar="RUN", help=said)
    parser.add_argument("others", metavar="RUN", nargs="+", help=f"to compare with it: {said}")


def run(given: argparse.Namespace) -> int:
    """Raises DeployError where one cannot be read, or there are more than the alphabet names."""
    names = [given.first, *given.others]
    if len(names) > len(LETTERS):
        raise DeployError(f"{len(names)} runs are given: at most {len(LETTERS)} fit a table")
    print(comparison([read_run(name) for name in names]))
    return 0
