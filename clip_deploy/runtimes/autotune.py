"""A tower's operators on a GPU: our kernels or a library's, whichever is the faster for a shape.

Each shape is timed once, when it is first met on this GPU; the fastest way is kept, on the disk too (choices.py).
A shape's first call only begins to compile its kernels, so that those of a whole layer are compiled side by side.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from clip_deploy.core.environment import cores
from clip_deploy.onnx_graph.torch_module import Activation, Operators
from clip_deploy.runtimes import kernels
from clip_deploy.runtimes.choices import Choices

MIN_QUERIES = 16  # a block of queries that the tensor cores take
MANY_ROWS = 1024  # of a matmul, which then needs no parts of its depth to fill them
MAX_TOKENS = 1024  # tokens that our attention takes; longer sequences go to PyTorch's kernels
FEW_TOKENS = 128  # up to here PyTorch's kernels are slower, and not tried
HEADS = (16, 32, 64, 128)  # widths of a head that the tensor cores take
CALLS, TRIES = 8, 9  # of each way that is timed: calls in a CUDA graph, and replays, whose median counts
MAX_LAYERS = 128  # whose weights are read in turn


class TunedOperators(Operators):
    """The operators of a tower in float16 or bfloat16 on a GPU."""

    def __init__(self) -> None:
        self.fastest: dict[tuple[Any, ...], Callable[..., Any]] = {}  # by operator and shapes
        self.choices = Choices(*_valid_for())
        self.compiling: dict[tuple[Any, ...], list[Future[None]]] = {}  # calls in threads, by operator and shapes

    def quantise(self, hidden: Tensor, inverse: float) -> Tensor:
        return kernels.quantise(hidden, inverse)

    def linear(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        activation: Activation | None = None,
        inverse: float | None = None,
    ) -> Tensor:
        if hidden.dtype is torch.float32 or hidden.shape[-1] % 8 or weight.shape[0] % 8:
            return super().linear(hidden, weight, bias, scale, activation=activation, inverse=inverse)
        flat = hidden.reshape(-1, hidden.shape[-1])
        key = ("linear", flat.shape, weight.shape, bias is None, activation, hidden.dtype, inverse is None)
        ways = _linear_candidates(len(flat), flat.shape[1], activation, scale is not None)
        output = self._choose(key, ways, flat, weight, bias, scale, activation, inverse)
        return output.view(*hidden.shape[:-1], weight.shape[0])

    def attention(self, packed: Tensor, heads: int, scale: float, causal: bool, inverse: float | None = None) -> Tensor:
        _, tokens, width = packed.shape
        head = width // 3 // heads
        if packed.dtype is torch.float32 or tokens > MAX_TOKENS or head not in HEADS:
            return super().attention(packed, heads, scale, causal, inverse)
        fit = [blocks for blocks in kernels.QUERIES if blocks[0] <= max(MIN_QUERIES, 2 * tokens)]
        ways: list[Callable[..., Tensor]] = [partial(kernels.attention, blocks=blocks) for blocks in fit]
        if tokens > FEW_TOKENS:
            ways.insert(0, super().attention)
        key = ("attention", packed.shape, heads, causal, inverse is None)
        return self._choose(key, ways, packed, heads, scale or head**-0.5, causal, inverse)

    def pooled_attention(
        self,
        query: Tensor,
        packed: Tensor,
        mask: Tensor | None = None,
        *,
        heads: int,
        scale: float,
        inverse: float | None = None,
    ) -> Tensor:
        head, given = query.shape[-1] // heads, [query, packed, *([] if mask is None else [mask])]
        if query.dtype is torch.float32 or head not in HEADS or not all(tensor.is_contiguous() for tensor in given):
            return super().pooled_attention(query, packed, mask, heads=heads, scale=scale, inverse=inverse)
        return kernels.pooled_attention(query, packed, mask, heads, scale or head**-0.5, inverse)

    def skip_layer_norm(
        self,
        hidden: Tensor,
        skip: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        added: Tensor | None = None,
        *,
        epsilon: float,
        inverse: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        if skip.numel() > hidden.numel():
            hidden, skip = skip, hidden
        alike = skip.shape[-2:] == hidden.shape[-2:] and skip.numel() in (hidden.numel(), hidden[:1].numel())
        if not hidden.is_contiguous() or not skip.is_contiguous() or not alike:
            return super().skip_layer_norm(hidden, skip, weight, bias, added, epsilon=epsilon, inverse=inverse)
        return kernels.skip_layer_norm(hidden, skip, weight, bias, added, epsilon, inverse)

    def linear_skip_layer_norm(
        self,
        hidden: Tensor,
        matrix: Tensor,
        addend: Tensor | None,
        scale: Tensor | None,
        skip: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        added: Tensor | None = None,
        epsilon: float = 1e-5,
        inverse: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        one_by_one = super().linear_skip_layer_norm
        given = (hidden, matrix, addend, scale, skip, weight, bias, added, epsilon, inverse)
        both = addend is not None and added is not None
        alike = skip.shape[:-1] == hidden.shape[:-1] and skip.is_contiguous()
        if hidden.dtype is torch.float32 or len(matrix) % 8 or both or not alike:
            return one_by_one(*given)
        count = hidden.numel() // hidden.shape[-1]
        ways: list[Callable[..., Any]] = [one_by_one, *_sum_candidates(count, matrix, scale is not None)]
        key = ("sum", count, matrix.shape, addend is None, added is None, hidden.dtype, inverse is None)
        found: tuple[Tensor, Tensor] = self._choose(key, ways, *given)
        return found

    def patchify(self, pixels: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return kernels.patchify(pixels, size, dtype)

    def _choose(self, key: tuple[Any, ...], ways: Sequence[Callable[..., Any]], *given: Any) -> Any:
        """Call the fastest way for these shapes.

        Where they are new: the first call takes the first way and begins to compile the others, the second times all.
        A way is kept for other layers, so it holds nothing of a layer: all of that is given.
        """
        if key not in self.fastest:
            known = self.choices.get(repr(key))
            if known is None or not 0 <= known < len(ways):
                if key not in self.compiling:
                    self.compiling[key] = compile_all(ways[1:], given)
                    return ways[0](*given)
                for begun in self.compiling.values():  # those of others too: they call the GPU when they are compiled
                    while begun:
                        begun.pop().result()
                others = other_layers(given)
                times = [median_ms(way, given, others) for way in ways]
                known = self.choices.settle(repr(key), times.index(min(times)))
            self.fastest[key] = ways[known % len(ways)]
        return self.fastest[key](*given)


def _valid_for() -> list[str]:
    """The GPU, its software, and our code."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    sources = [Path(file).read_text() for file in (__file__, kernels.__file__)]
    return [gpu, torch.__version__, str(torch.version.cuda), triton.__version__, *sources]


def other_layers(given: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """What calls for other layers are given, so many that the L2 cache holds the weights of none.

    Where rows are few, to read the weights is what takes the time. All tensors but the first count as weights.
    """
    size = sum(item.numel() * item.element_size() for item in given[1:] if isinstance(item, Tensor))
    if not size or not given[0].is_cuda or given[0].numel() > kernels.FEW_ROWS * given[0].shape[-1]:
        return []
    count = min(MAX_LAYERS, triton.cdiv(torch.cuda.get_device_properties().L2_cache_size, size))
    return [
        (given[0], *(item.clone() if isinstance(item, Tensor) else item for item in given[1:])) for _ in range(count)
    ]


def compile_all(ways: Sequence[Callable[..., Any]], given: tuple[Any, ...]) -> list[Future[None]]:
    """Begin to call each way once, in threads: Triton compiles a kernel in its first call, mostly without the GIL."""
    stream = torch.cuda.current_stream()

    def call(way: Callable[..., Any]) -> None:
        with torch.inference_mode(), torch.cuda.stream(stream), suppress(triton.runtime.errors.OutOfResources):
            way(*given)

    # a thread has no CUDA context before its first call of CUDA's runtime
    pool = ThreadPoolExecutor(cores(), initializer=torch.cuda.synchronize, initargs=(stream.device,))
    begun = [pool.submit(call, way) for way in ways]
    pool.shutdown(wait=False)
    return begun


def median_ms(way: Callable[..., Any], given: tuple[Any, ...], others: Sequence[tuple[Any, ...]] = ()) -> float:
    """Milliseconds of a call on the GPU, replayed from a CUDA graph; infinite where it needs more than this GPU has.

    `others`: what other calls of the graph are given.
    """
    calls = [given, *others] * max(1, CALLS // (1 + len(others)))
    try:
        for inputs in calls[: 1 + len(others)]:
            way(*inputs)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    torch.cuda.synchronize()
    graph, marks = torch.cuda.CUDAGraph(), [torch.cuda.Event(enable_timing=True) for _ in range(TRIES + 1)]
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for inputs in calls:
            way(*inputs)
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    found: float = sorted(start.elapsed_time(end) for start, end in pairwise(marks))[TRIES // 2] / len(calls)
    return found


def _sum_candidates(count: int, matrix: Tensor, fp8: bool) -> list[Callable[..., tuple[Tensor, Tensor]]]:
    """Ways to a matmul's sum with what is skipped, besides one after the other."""
    fit = [(tiles, parts) for tiles, parts in kernels.SPLIT if tiles.divides(matrix.shape[1], fp8, parts)]
    ways: list[Callable[..., tuple[Tensor, Tensor]]] = [_fp8_by_cublas] if fp8 else []
    if count <= MANY_ROWS:
        ways += [partial(_in_parts, tiles=tiles, parts=parts) for tiles, parts in fit]
    return ways


def _fp8_by_cublas(
    hidden: Tensor,
    matrix: Tensor,
    addend: Tensor | None,
    scale: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    epsilon: float,
    inverse: float | None,
) -> tuple[Tensor, Tensor]:
    held = addend if added is None else added
    return kernels.fp8_linear_skip_layer_norm(hidden, matrix, scale, skip, weight, bias, held, epsilon, inverse)


def _in_parts(
    hidden: Tensor,
    matrix: Tensor,
    addend: Tensor | None,
    scale: Tensor | None,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    epsilon: float,
    inverse: float | None,
    *,
    tiles: kernels.Tiles,
    parts: int,
) -> tuple[Tensor, Tensor]:
    held = addend if added is None else added
    return kernels.linear_skip_layer_norm(
        hidden, matrix, scale, skip, weight, bias, held, epsilon, inverse, tiles, parts
    )


def _linear_candidates(rows: int, depth: int, activation: Activation | None, fp8: bool) -> list[Callable[..., Tensor]]:
    """cuBLAS is taken unasked where there are many rows and nothing to fuse."""
    tiles: tuple[kernels.Tiles, ...] = ()
    if rows <= kernels.FEW_ROWS:
        tiles = (*kernels.SMALL, *(item for item in kernels.FEW if item.divides(depth, fp8)))
    elif fp8:
        tiles = kernels.LARGE_FP8
    elif activation:
        tiles = kernels.LARGE
    library = [kernels.cublas_linear, *([kernels.cublas_fp8_linear] if fp8 else [])]
    return [*library, *(partial(kernels.triton_linear, tiles=item) for item in tiles)]
