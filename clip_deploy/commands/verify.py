"""Compare a folder's files with its manifest: is it what was built and checked?

Exit code 0: every file is there and unchanged, and none was added. 1: there are differences, which it prints, or the
folder could not be compared.

example: clip-deploy verify artifacts/package
"""

import argparse

from clip_deploy.commands.paths import local_path
from clip_deploy.core.manifest import described, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=local_path,
        help="a target's (artifacts/ort-fp32, with ort-fp32.manifest.json beside it), artifacts/package or "
        "artifacts/triton",
    )


def run(given: argparse.Namespace) -> int:
    manifest, found = verify(given.folder)
    for difference in found:
        print(f"{given.folder}/{printable(difference)}")
    print(f"{given.folder}: {'not what its manifest says' if found else printable(described(manifest))}")
    return 1 if found or manifest.unavailable is not None else 0


def printable(text: str) -> str:
    """In one line, and without what a terminal obeys: a manifest may come from anywhere."""
    return text if text.isprintable() else ascii(text)
