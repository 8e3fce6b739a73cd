"""Put two machines, or two runs on one, side by side, as a Markdown table.

example: clip-deploy compare reports reports-of-the-xeon > both.md
"""

import argparse

from clip_deploy.commands.paths import local_path
from clip_deploy.report.compare import comparison, read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("REPORTS_A", "REPORTS_B"):
        parser.add_argument(name.lower(), metavar=name, type=local_path, help="a folder as reports/")


def run(given: argparse.Namespace) -> int:
    print(comparison(read_run(given.reports_a), read_run(given.reports_b)))
    return 0
