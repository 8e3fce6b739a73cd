"""Answer over HTTP: embeddings, zero-shot labels and rankings.

It speaks OpenAI's embeddings API. /docs lists all requests, and the page at / tries them. Only this machine can reach
it unless you give --host. It needs the extra `serve` (pip install 'clip-deploy[serve]'). On SIGTERM it finishes
running requests and ends.

example: clip-deploy serve artifacts/package --port 8000
"""

import argparse
import os
from pathlib import Path

from clip_deploy.commands.opened import warn_if_outdated
from clip_deploy.commands.paths import local_path
from clip_deploy.inference.classifier import FEEDS
from clip_deploy.web.libraries import check_libraries
from clip_deploy.web.settings import Settings

DEFAULT = Settings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "packages",
        metavar="PACKAGE",
        nargs="*",
        help="a folder, NAME=FOLDER or NAME:VERSION=FOLDER; a request's `model` picks one, and without it the first "
        f"answers; default: {DEFAULT.packages[0]}",
    )
    parser.add_argument("--host", default=DEFAULT.host, help="the address to listen on; default: %(default)s")
    parser.add_argument(
        "--port", type=int, default=DEFAULT.port, help="the port to listen on; 0 takes a free one; default: %(default)s"
    )
    parser.add_argument(
        "--workers", type=int, default=DEFAULT.workers, help="processes that answer; default: %(default)s"
    )
    parser.add_argument("--device", help="cpu or cuda; default: the one that a package was made for")
    parser.add_argument("--threads", type=int, help="threads for each tower; default: the runtime decides")
    parser.add_argument(
        "--feed",
        choices=FEEDS,
        default=DEFAULT.feed,
        help="how JPEGs are read: fast (on the CPU) and gpu are several times as fast, with pixels about a grey level "
        "off (extras `fast`, `fast-gpu`); default: %(default)s",
    )
    parser.add_argument(
        "--api-key-file", type=local_path, help="a file with one key a line; each request must send one of them"
    )
    parser.add_argument(
        "--allow-host",
        dest="allow_hosts",
        metavar="NAME",
        action="append",
        default=[],
        help="also answer to this host name, which a proxy on this machine passes on; may be repeated; default: "
        "addresses and localhost",
    )
    parser.add_argument(
        "--allow-image-host",
        dest="image_hosts",
        metavar="HOST",
        action="append",
        default=[],
        help="fetch images by https from this host; may be repeated; default: from none",
    )
    parser.add_argument(
        "--index",
        type=local_path,
        metavar="FOLDER",
        help="a folder to search, which `embed` or `index` wrote with one of these packages",
    )
    parser.add_argument(
        "--images",
        type=local_path,
        metavar="FOLDER",
        help="the folder that was embedded, to show the images that a search finds",
    )
    _add_limits(parser.add_argument_group("limits"))


def _add_limits(bounds: argparse._ArgumentGroup) -> None:
    for name, kind, said in (
        ("max_items", int, "texts and images of one request"),
        ("max_body_mb", float, "MB of a request"),
        ("max_megapixels", float, "million pixels of an image"),
        ("max_queue", int, "texts, and images, that may wait for each package; others are told to try again (429)"),
        ("max_wait_ms", float, "ms that a batch waits for images that are being read"),
        ("timeout_s", float, "seconds for a request to arrive, and for its answer"),
        ("drain_s", float, "seconds after SIGTERM in which requests are still accepted, though not ready"),
    ):
        option = f"--{name.replace('_', '-')}"
        value = getattr(DEFAULT, name)
        bounds.add_argument(option, metavar="N", type=kind, default=value, help=f"{said}; default: %(default)s")


def run(given: argparse.Namespace) -> int:
    """Raises DeployError where the settings, a package or the address will not do."""
    # Of another server: prometheus_client reads it when it is imported, and its numbers would be told as ours.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    check_libraries()
    from clip_deploy.web.models import parsed
    from clip_deploy.web.server import serve

    named = {name: value for name, value in vars(given).items() if name in Settings.__dataclass_fields__}
    lists = {name: tuple(named[name]) for name in ("packages", "allow_hosts", "image_hosts")}
    lists["packages"] = lists["packages"] or DEFAULT.packages
    for package in lists["packages"]:
        warn_if_outdated(Path(parsed(package)[2]))
    return serve(Settings(**named | lists))
