"""Add Triton's models as the next version to a repository that is served, or take a version back.

With the address of the server's HTTP port it loads the version at once; without, it does at its next start. Exit code 1
says why not, and nothing has changed.

examples: clip-deploy publish artifacts/triton/onnxruntime /srv/clip/onnxruntime http://localhost:8000
          clip-deploy publish --withdraw 2 /srv/clip/onnxruntime http://localhost:8000
"""

import argparse

from clip_deploy.commands.paths import local_path
from clip_deploy.core.errors import DataError
from clip_deploy.serving.publish import publish, withdraw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--withdraw", action="store_true", help="take the version that is named first out again")
    parser.add_argument(
        "subject",
        metavar="REPOSITORY|VERSION",
        help="artifacts/triton/onnxruntime or artifacts/triton/python; with --withdraw a version, as 2",
    )
    parser.add_argument(
        "served", metavar="SERVED", type=local_path, help="the copy of a repository that a server reads"
    )
    parser.add_argument("url", metavar="URL", nargs="?", help="of the server, as http://localhost:8000")


def run(given: argparse.Namespace) -> int:
    url = given.url.rstrip("/") if given.url else None
    if url and not url.startswith(("http://", "https://")):
        raise DataError(f"the server's address is {given.url}: give it as http://localhost:8000")
    if given.withdraw:
        version = withdraw(given.served, given.subject, url)
    else:
        version = publish(local_path(given.subject), given.served, url)
    print(f"{given.served}: version {version} is the newest" + ("" if url else "; a server takes it at its next start"))
    return 0
