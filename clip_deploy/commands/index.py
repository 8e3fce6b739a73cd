"""Make an index of what `embed` wrote, for a faster `search`.

A search reads only a part of an index, but all of what `embed` wrote. It needs FAISS (pip install
'clip-deploy[index]'). After another run of `embed`, make the index again.

example: clip-deploy index embeddings embeddings-index
"""

import argparse

from clip_deploy.inference.index import build_index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="what `embed` wrote: a folder of parts, or its URI")
    parser.add_argument("output", help="a folder on this machine; an index that is there is replaced")


def run(given: argparse.Namespace) -> int:
    made = build_index(given.source, given.output)
    cells = f", {made.cells:,} cells" if made.cells > 1 else ", searched whole"
    print(
        f"{given.output}: {made.rows:,} vectors of {made.dimensions:,} dimensions, {made.dtype}, "
        f"{sum(made.sizes.values()) / 1e6:,.1f} MB{cells}"
    )
    return 0
