"""Add models as the next version to a Triton repository that is served, or withdraw a version.

Give the address of the server's HTTP port, and the server loads the version at once. Without it, the server loads the
version at its next start. Exit code 1: nothing has changed, and the message says why.

examples: clip-deploy publish artifacts/triton/onnxruntime /srv/clip/onnxruntime http://localhost:8000
          clip-deploy publish --withdraw 2 /srv/clip/onnxruntime http://localhost:8000
"""

import argparse

from clip_deploy.commands.paths import local_path
from clip_deploy.core.errors import DataError
from clip_deploy.serving.publish import publish, withdraw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--withdraw", action="store_true", help="withdraw VERSION from SERVED")
    parser.add_argument(
        "subject",
        metavar="REPOSITORY|VERSION",
        help="artifacts/triton/onnxruntime or artifacts/triton/python; with --withdraw a version, for example 2",
    )
    parser.add_argument(
        "served", metavar="SERVED", type=local_path, help="the copy of a repository that a server reads"
    )
    parser.add_argument("url", metavar="URL", nargs="?", help="the server's address, for example http://localhost:8000")


def run(given: argparse.Namespace) -> int:
    url = given.url.rstrip("/") if given.url else None
    if url and not url.startswith(("http://", "https://")):
        raise DataError(f"the server's address is {given.url}: give it in full, for example http://localhost:8000")
    if given.withdraw:
        version = withdraw(given.served, given.subject, url)
    else:
        version = publish(local_path(given.subject), given.served, url)
    print(f"{given.served}: version {version} is the newest" + ("" if url else "; a server takes it at its next start"))
    return 0
