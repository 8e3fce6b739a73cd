"""Time our GPU kernels beside what the libraries offer, at the shapes of ViT-B/32's towers.

    python -m benchmarks.kernels output=reports/hardware/nvidia-h200/kernels.md

Each time is a call's on the GPU, replayed from a CUDA graph, on inputs that its cache may hold (autotune.median_ms).
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from clip_deploy.core.files import write_text
from clip_deploy.onnx_graph.torch_module import MAX_FP8, Activation, Operators
from clip_deploy.report.tables import number, table
from clip_deploy.runtimes import kernels
from clip_deploy.runtimes.autotune import median_ms
from clip_deploy.runtimes.fused import FP8_CAPABILITY

TOWERS = {"vision": (768, 12, 50, False), "text": (512, 8, 77, True)}  # width, heads, tokens, causal
BATCHES = (1, 8, 32, 256)
HEAD = ["Tower", "Batch", "Operator", "Library us", "Ours us", "Ours / library", "Our fastest", "Our TFLOP/s"]
LIBRARY = Operators()

Way = Callable[..., Any]


def main() -> None:
    output = Path(dict(word.split("=", 1) for word in sys.argv[1:])["output"])
    name = torch.cuda.get_device_name()
    rows = [row for tower in TOWERS for batch in BATCHES for row in timings(tower, batch)]
    lines = [
        f"# Kernels on {name}",
        "",
        f"`python -m benchmarks.kernels`: torch {torch.__version__}, triton {triton.__version__}; microseconds of a "
        "call on the GPU, replayed from a CUDA graph. Library: cuBLAS with a pass for the activation, in FP8 with a "
        "scale for each row and output, PyTorch's scaled_dot_product_attention, its layer_norm behind an addition, its "
        "permuted copy. `torch-fused-*` targets time both once for each shape that they meet, and keep the faster.",
        "",
        *table(HEAD, rows),
        "",
    ]
    write_text(output, "\n".join(lines))
    print("\n".join(lines))


def timings(tower: str, batch: int) -> Iterator[list[str]]:
    width, heads, tokens, causal = TOWERS[tower]
    row = partial(_row, tower, batch)
    count = batch * tokens
    for name, depth, wide, activation in (
        ("queries, keys, values", width, 3 * width, None),
        ("projection", width, width, None),
        ("first of MLP, QuickGELU", width, 4 * width, Activation("QuickGelu")),
        ("second of MLP", 4 * width, width, None),
    ):
        given: tuple[Any, ...] = (_random(count, depth), _random(wide, depth), _random(wide), None, activation, None)
        ways: dict[str, Way] = {
            str(tiles): partial(kernels.triton_linear, tiles=tiles) for tiles in (*kernels.LARGE_FP8, *kernels.SMALL)
        }
        yield row(name, kernels.cublas_linear, ways, given, 2 * count * depth * wide)
        if torch.cuda.get_device_capability() >= FP8_CAPABILITY:
            given = (*map(_fp8, given[:2]), given[2], torch.ones(wide, device="cuda"), activation, None)
            yield row(f"{name}, FP8", kernels.cublas_fp8_linear, ways, given, 2 * count * depth * wide)
    packed = (_random(batch, tokens, 3 * width), heads, 64**-0.5, causal)
    ways = {str(blocks): partial(kernels.attention, blocks=blocks) for blocks in kernels.QUERIES}
    yield row("attention", LIBRARY.attention, ways, packed, 4 * count * tokens * width)
    summed = (_random(batch, tokens, width), _random(batch, tokens, width), *(_random(width) for _ in range(3)), 1e-5)
    yield row("sum, LayerNormalization", _normalise_by_library, {"": kernels.skip_layer_norm}, summed)
    if tower == "vision":
        images = (torch.randn(batch, 3, 224, 224, device="cuda"), (32, 32), torch.float16)
        yield row("cast, patches", LIBRARY.patchify, {"": kernels.patchify}, images)


def _normalise_by_library(*given: Any) -> Any:
    return LIBRARY.skip_layer_norm(*given[:-1], epsilon=given[-1])


def _fp8(values: Tensor) -> Tensor:
    """Values as large as FP8 takes them."""
    return LIBRARY.quantise(values, MAX_FP8 / values.abs().max().item())


def _random(*shape: int) -> Tensor:
    return (torch.randn(*shape, device="cuda") * shape[-1] ** -0.5).half()


def _row(
    tower: str, batch: int, name: str, library: Way, ways: dict[str, Way], given: tuple[Any, ...], flop: int = 0
) -> list[str]:
    theirs = median_ms(library, given)
    ours, label = min((median_ms(way, given), label) for label, way in ways.items())
    cells = [number(1000 * theirs), number(1000 * ours), f"{ours / theirs:.2f}", label or "-"]
    return [tower, str(batch), name, *cells, number(flop / ours / 1e9) if flop else "-"]


if __name__ == "__main__":
    main()
