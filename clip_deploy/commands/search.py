"""Find the images that a text describes best.

Exit code 3: done, but some images could not be read and were left out.

example: clip-deploy search embeddings "a photo of a yellow star" --top 3
"""

import argparse

from clip_deploy.commands.opened import add_package_arguments, name_unreadable, open_package
from clip_deploy.core.errors import DataError
from clip_deploy.inference.classifier import check_count
from clip_deploy.inference.search import SEARCHED, search
from clip_deploy.inference.storage import shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_package_arguments(parser)
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder of images, or what `embed` (a folder, part or URI) or `index` wrote"
    )
    parser.add_argument("text", metavar="TEXT", help="what the images show, in plain words")
    parser.add_argument("--top", type=int, default=10, help="how many to show; default: %(default)s")


def run(given: argparse.Namespace) -> int:
    check_count("top", given.top)
    found = search(open_package(given), given.source, given.text, given.top)
    for cosine, path in found.hits:
        print(f"{cosine:.4f}  {path}")
    code = name_unreadable(found.unreadable)
    if not found.hits:
        raise DataError(f"{shown(given.source)} holds no image that could be read: {SEARCHED}")
    return code
