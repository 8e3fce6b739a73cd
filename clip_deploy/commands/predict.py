"""Say which text describes an image best.

example: clip-deploy predict photo.jpg "a photo of a dog" "a photo of a cat"
"""

import argparse

from clip_deploy.commands.opened import add_package_arguments, open_package
from clip_deploy.commands.paths import local_path
from clip_deploy.inference.classifier import check_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_package_arguments(parser)
    parser.add_argument("image", metavar="IMAGE", type=local_path, help="an image file, for example photo.jpg")
    parser.add_argument(
        "texts",
        metavar="TEXT",
        nargs="*",
        default=[],  # else argparse calls it required where the image is missing
        help="what the image may show, in plain words; default: the package's classes, in its templates",
    )
    parser.add_argument("--top", type=int, default=5, help="how many to show; default: %(default)s")


def run(given: argparse.Namespace) -> int:
    check_count("top", given.top)
    classifier = open_package(given)
    for text, probability in classifier.predict(given.image, given.texts or None)[: given.top]:
        print(f"{probability:.4f}  {text}")
    return 0
