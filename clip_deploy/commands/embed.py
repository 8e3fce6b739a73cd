"""Write the embeddings of images as Parquet files.

After a stop, the same command continues. It also takes up images that were added, changed or removed since. Exit code
3: done, but some images could not be read.

example: clip-deploy embed photos embeddings --dtype float16
"""

import argparse
from functools import partial

from clip_deploy.commands.opened import add_package_arguments, check_package, name_unreadable, open_package
from clip_deploy.core.errors import DataError
from clip_deploy.core.vectors import DTYPES
from clip_deploy.inference.classifier import FEEDS
from clip_deploy.inference.embed import EmbedSettings, Summary, embed, make_here
from clip_deploy.inference.embed_gpus import Opening, choose_gpus, make_on_gpus
from clip_deploy.inference.embed_ray import Shipped, make_on_ray
from clip_deploy.inference.storage import Columns, Source, check_apart, open_source, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_package_arguments(parser, takes_texts=False)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images, of Parquet or of tar files, one such file, or a URI (s3://, hf://...)",
    )
    parser.add_argument("output", metavar="OUTPUT", help="a folder, which is made if it is not there, or a URI")
    parser.add_argument(
        "--id-column", help="of a Parquet source, the column with the images' names; default: id, or else row numbers"
    )
    parser.add_argument(
        "--image-column",
        default="image",
        help="of a Parquet source, the column with the images' bytes; default: %(default)s",
    )
    parser.add_argument("--batch-size", type=int, help="images in one call; default: the fastest in the benchmark")
    parser.add_argument("--part-size", type=int, default=10_000, help="images in one output file; default: %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="bits of each number: 32, 16, 8 or 1; default: %(default)s"
    )
    parser.add_argument("--dimensions", type=int, metavar="N", help="keep the first N numbers; default: all")
    parser.add_argument(
        "--gpus", metavar="GPUS", help="start a process for each of these GPUs: all, or numbers, for example 0,1"
    )
    parser.add_argument(
        "--feed",
        choices=FEEDS,
        default="exact",
        help="how JPEGs are read: fast (on the CPU) and gpu are several times as fast, with pixels about a grey level "
        "off (extras `fast`, `fast-gpu`); default: %(default)s",
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="on a Ray cluster: auto (this machine's), local, or host:port")


def run(given: argparse.Namespace) -> int:
    done = _embedded(given)
    code = name_unreadable(done.unreadable)
    gone = f"{done.gone:,} gone, " if done.gone else ""
    speed = f" ({done.embedded_now / done.seconds:,.0f} images/s)" if done.embedded_now else ""
    print(
        f"{shown(given.output)}: {done.images:,} images, {done.embedded_before:,} embedded before, "
        f"{done.embedded_now:,} now{speed}, {gone}{len(done.unreadable):,} unreadable"
    )
    return code


def _embedded(given: argparse.Namespace) -> Summary:
    if given.gpus is not None and given.ray is not None:
        raise DataError(
            "--gpus and --ray are both given: give one of them; with --ray and --device cuda each worker takes a GPU"
        )
    settings = EmbedSettings(given.batch_size, given.part_size, given.dtype, given.dimensions)
    columns = Columns(given.id_column, given.image_column)
    check_apart(given.source, given.output)
    source = open_source(given.source, settings.part_size, columns, shared=given.ray is not None)
    if given.gpus is not None:
        return _on_gpus(given, source, settings)
    if given.ray is None:
        classifier = open_package(given, feed=given.feed, allow_spinning=False)
        return embed(classifier, source, given.output, settings, partial(make_here, classifier))
    check_package(given.package)
    package = Shipped.read(given.package, given.device, given.threads, given.feed)
    return embed(package, source, given.output, settings, partial(make_on_ray, package, given.ray))


def _on_gpus(given: argparse.Namespace, source: Source, settings: EmbedSettings) -> Summary:
    chosen = choose_gpus(given.gpus)
    check_package(given.package)
    package = Opening.read(given.package, given.device or "cuda", given.threads, given.feed)
    return embed(package, source, given.output, settings, partial(make_on_gpus, package, chosen))
