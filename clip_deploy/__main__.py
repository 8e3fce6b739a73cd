"""Use a package from a terminal: `python -m clip_deploy predict`, `embed` or `search`."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    from clip_deploy.inference.classifier import ZeroShotClassifier, check_count
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed: pip install numpy pillow tokenizers onnxruntime")

from clip_deploy.core.errors import DeployError, quiet_if_unread

UNREADABLE = 3  # exit code
STOPPED = 130  # what shells report of Ctrl-C

Command = Callable[[argparse.Namespace], int]


@quiet_if_unread()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        return given.run(given)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m clip_deploy", description=__doc__)
    commands = whole.add_subparsers(required=True, metavar="predict | embed | search")
    _add_predict(commands)
    _add_embed(commands)
    _add_search(commands)
    return whole


def _add(commands: Any, name: str, run: Command, description: str) -> argparse.ArgumentParser:
    """A command with what all of them take."""
    command = commands.add_parser(name, help=description, description=description)
    command.add_argument("--package", type=Path, default=Path("artifacts/package"), help="default: %(default)s")
    command.add_argument("--device", help="cpu or cuda; default: the one that the package was made for")
    command.add_argument("--threads", type=int, help="of each tower; default: ONNX Runtime's choice")
    command.add_argument("--cache", type=Path, help="a folder in which embeddings of texts are kept")
    command.set_defaults(run=run)
    return command


def _add_predict(commands: Any) -> None:
    command = _add(commands, "predict", _predict, "Say which text describes an image best.")
    command.add_argument("image", type=Path)
    command.add_argument("texts", nargs="*", help="default: the package's classes, in its templates")
    command.add_argument("--top", type=int, default=5, help="how many are shown; default: %(default)s")


def _add_embed(commands: Any) -> None:
    command = _add(
        commands,
        "embed",
        _embed,
        "Write the embeddings of images as Parquet files. The same command goes on after a stop, and takes up what "
        "came, changed or went in a folder since. "
        f"Exit code {UNREADABLE} says that all is done but some images could not be read.",
    )
    command.add_argument("source", help="a folder of images or of Parquet, one Parquet file, or a URI (s3://...)")
    command.add_argument("output", help="a folder, or a URI")
    command.add_argument("--id-column", default="id", help="of a Parquet source; default: %(default)s")
    command.add_argument(
        "--image-column", default="image", help="images' bytes in a Parquet source; default: %(default)s"
    )
    command.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    command.add_argument("--part-size", type=int, default=10_000, help="images a file; default: %(default)s")
    command.add_argument("--float16", action="store_true", help="half the bytes, three digits of each number")
    command.add_argument(
        "--ray", metavar="ADDRESS", help="on a Ray cluster: auto (this machine's), local, or host:port"
    )


def _add_search(commands: Any) -> None:
    command = _add(
        commands,
        "search",
        _search,
        "Find the images that a text describes best. "
        f"Exit code {UNREADABLE} says that some images could not be read and were left out.",
    )
    command.add_argument("source", help="a folder of images, or what `embed` wrote")
    command.add_argument("text")
    command.add_argument("--top", type=int, default=10, help="how many are shown; default: %(default)s")


def _open(given: argparse.Namespace) -> ZeroShotClassifier:
    return ZeroShotClassifier.open(given.package, device=given.device, threads=given.threads, cache_folder=given.cache)


def _predict(given: argparse.Namespace) -> int:
    check_count("top", given.top)
    classifier = _open(given)
    for text, probability in classifier.predict(given.image, given.texts or None)[: given.top]:
        print(f"{probability:.4f}  {text}")
    return 0


def _embed(given: argparse.Namespace) -> int:
    from clip_deploy.inference.embed import EmbedSettings, embed, make_here
    from clip_deploy.inference.embed_ray import Shipped, make_on_ray
    from clip_deploy.inference.storage import Columns, open_source, shown

    settings = EmbedSettings(given.batch_size, given.part_size, given.float16)
    columns = Columns(given.id_column, given.image_column)
    source = open_source(given.source, settings.part_size, columns, shared=given.ray is not None)
    if given.ray is None:
        classifier = _open(given)
        done = embed(classifier, source, given.output, settings, partial(make_here, classifier))
    else:
        package = Shipped.read(given.package, given.device, given.threads)
        done = embed(package, source, given.output, settings, partial(make_on_ray, package, given.ray))
    code = _named(done.unreadable)
    gone = f"{done.gone:,} gone, " if done.gone else ""
    speed = f" ({done.embedded_now / done.seconds:,.0f} images/s)" if done.embedded_now else ""
    print(
        f"{shown(given.output)}: {done.images:,} images, {done.embedded_before:,} embedded before, "
        f"{done.embedded_now:,} now{speed}, {gone}{len(done.unreadable):,} unreadable"
    )
    return code


def _named(unreadable: list[str]) -> int:
    """Say what could not be read, and return the exit code."""
    for line in unreadable:
        print(f"warning: {line}", file=sys.stderr)
    return UNREADABLE if unreadable else 0


def _search(given: argparse.Namespace) -> int:
    from clip_deploy.inference.search import search

    check_count("top", given.top)
    found = search(_open(given), given.source, given.text, given.top)
    for cosine, path in found.hits:
        print(f"{cosine:.4f}  {path}")
    return _named(found.unreadable)


if __name__ == "__main__":
    sys.exit(main())
