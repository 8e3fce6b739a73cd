"""Kernels for NVIDIA GPUs, in Triton (https://triton-lang.org), for what the libraries leave in several passes.

An encoder's matmuls are short (a width of 512 to 1,024), so what stands between them, reading and writing every row,
takes long beside them. One kernel multiplies, adds the bias and applies the activation; one attends straight from the
packed matmul; one adds the skip connection and normalises; one cuts an image into patches.

Matmuls take FP8 (E4M3) too, at twice the rate of FP16 from Ada and Hopper on. What writes a matmul's input rounds it to
FP8 as it writes: QUANTISED, with `inverse`, one over the scale.

Kernels of a few microseconds follow one another faster where the next is started while the last one runs and waits for
it on the GPU (programmatic dependent launch, from Hopper on: DEPENDENT). Each waits before it touches what another
kernel writes; a matmul of few rows asks for its weights before that.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from clip_deploy.onnx_graph.torch_module import FP8, MAX_FP8, Activation

LOG2_E = 1.4426950408889634
LIMIT = tl.constexpr(MAX_FP8)


@triton.jit
def _sigmoid(x, APPROXIMATE: tl.constexpr):
    """Exact to 2^-12 where APPROXIMATE: one instruction of the slow kind instead of two, enough for FP8."""
    if APPROXIMATE:
        half = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], tl.float32, True, 1)
        return 0.5 + 0.5 * half
    return tl.sigmoid(x)


@triton.jit
def _activated(x, alpha, KIND: tl.constexpr, APPROXIMATE: tl.constexpr):
    if KIND == "QuickGelu":
        x = x * _sigmoid(alpha * x, APPROXIMATE)
    elif KIND == "tanh":
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), APPROXIMATE)
    elif KIND == "erf":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _take_turn(DEPENDENT: tl.constexpr):
    """Wait for the kernel before, and let the one behind come up."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _rounded(x, inverse, output, QUANTISED: tl.constexpr):
    """x as `output` holds it: times `inverse` in FP8, where numbers beyond the largest become it."""
    if QUANTISED:
        x = tl.minimum(tl.maximum(x * inverse, -LIMIT), LIMIT)
    return x.to(output.dtype.element_ty)


@triton.jit
def _ask_for(places):
    """Have the lines of the L2 cache at these places read, and do not wait for them."""
    places = places.to(tl.int64)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], tl.int32, False, 1)


@triton.jit
def _fetch(weights, row, rows, start, SIZE: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr):
    """Ask for LINES lines of the L2 cache, from byte `start` on, of BLOCK rows of SIZE bytes each."""
    row = tl.minimum(row + tl.arange(0, BLOCK), rows - 1).to(tl.int64)
    line = tl.minimum(start + tl.arange(0, LINES) * 128, SIZE - 1)
    _ask_for(weights.to(tl.int64) + row[:, None] * SIZE + line[None, :])


@triton.jit
def _place(tile, down, across, GROUP: tl.constexpr):
    """Row and column of a tile: those that share weights are taken together."""
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    return first + tile % (GROUP * across) % height, tile % (GROUP * across) // height


@triton.jit(do_not_specialize=["M"])
def _matmul(
    hidden,
    weight,
    output,
    bias,
    scale,
    M,
    N,
    K,
    alpha,
    inverse,
    weights,
    SIZE: tl.constexpr,
    LINES: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    QUANTISED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """output [M, N] = activation(hidden [M, K] @ weight [N, K].T * scale + bias), each program tile after tile.

    Where K is cut into PARTS, the sums over each stand below one another, in rows of whole tiles.
    Where LINES is set, `weights`, rows of SIZE bytes, are asked for at once: so many lines of the cache each.
    """
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    if LINES:
        _, column = _place(tl.program_id(0) % (down * across), down, across, GROUP)
        start = tl.program_id(0) // (down * across) * (SIZE // PARTS)
        _fetch(weights, column * BLOCK_N, N, start, SIZE, BLOCK_N, LINES)
        first = tl.minimum(column * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
        if HAS_BIAS:
            _ask_for(bias + first)
        if HAS_SCALE:
            _ask_for(scale + first)
    _take_turn(DEPENDENT)
    steps = tl.cdiv(K, BLOCK_K * PARTS)
    for item in tl.range(tl.program_id(0), down * across * PARTS, tl.num_programs(0), flatten=True):
        part, tile = item // (down * across), item % (down * across)
        row, column = _place(tile, down, across, GROUP)
        row, column = row * BLOCK_M, column * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            left = hidden.load([row, (part * steps + step) * BLOCK_K])
            right = weight.load([column, (part * steps + step) * BLOCK_K])
            total = tl.dot(left, right.T, total)
        columns = column + tl.arange(0, BLOCK_N)
        if HAS_SCALE:
            total *= tl.load(scale + columns, mask=columns < N, other=0.0)[None, :]
        if HAS_BIAS:
            total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        total = _activated(total, alpha, KIND, APPROXIMATE)
        if QUANTISED:
            total = tl.minimum(tl.maximum(total * inverse, -LIMIT), LIMIT)
        output.store([part * down * BLOCK_M + row, column], total.to(output.dtype))


@triton.jit(do_not_specialize=["M"])
def _matmul_of_few(
    hidden,
    weight,
    output,
    bias,
    scale,
    M,
    N,
    K,
    alpha,
    inverse,
    SIZE: tl.constexpr,
    LINES: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    QUANTISED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """As _matmul, a tile for each program, without descriptors: to fetch those takes long where a kernel is short."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    part, tile = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    column, row = tile % across * BLOCK_N, tile // across * BLOCK_M
    columns, rows, places = column + tl.arange(0, BLOCK_N), row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    inside, held = rows[:, None] < M, columns < N
    if LINES:
        _fetch(weight, column, N, part * (SIZE // PARTS), SIZE, BLOCK_N, LINES)
    if HAS_SCALE:
        ratio = tl.load(scale + columns, mask=held, other=0.0)
    if HAS_BIAS:
        more = tl.load(bias + columns, mask=held, other=0.0).to(tl.float32)
    _take_turn(DEPENDENT)
    start = part * (K // PARTS)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(start, start + K // PARTS, BLOCK_K):
        place = tl.multiple_of(step, BLOCK_K) + places[None, :]
        left = tl.load(hidden + rows[:, None] * K + place, mask=inside, other=0.0)
        right = tl.load(weight + columns[:, None] * K + place, mask=held[:, None], other=0.0)
        total = tl.dot(left, right.T, total)
    if HAS_SCALE:
        total *= ratio[None, :]
    if HAS_BIAS:
        total += more[None, :]
    total = _activated(total, alpha, KIND, APPROXIMATE)
    output += (part * down * BLOCK_M + rows[:, None]) * N + columns[None, :]
    tl.store(output, _rounded(total, inverse, output, QUANTISED), mask=inside & held[None, :])


@triton.jit
def _patchify(
    pixels,
    patches,
    across,
    channels: tl.constexpr,
    tall: tl.constexpr,
    wide: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One patch of one image: [channels, tall, wide] of it in one row."""
    _take_turn(DEPENDENT)
    patch, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, BLOCK)
    size: tl.constexpr = channels * tall * wide
    inside = place < size
    channel, row, column = place // (tall * wide), place // wide % tall, place % wide
    width, count = across * wide, tl.num_programs(0)
    start = (image * channels + channel) * count * (tall * wide) + (patch // across * tall + row) * width
    values = tl.load(pixels + start + patch % across * wide + column, mask=inside)
    tl.store(patches + (image * count + patch) * size + place, values.to(patches.dtype.element_ty), mask=inside)


@triton.jit
def _activate(
    values,
    output,
    scale,
    bias,
    width,
    count,
    alpha,
    inverse,
    KIND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """What is left to do of a matmul's values [rows, width]: scale, bias, activation, rounding."""
    _take_turn(DEPENDENT)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    x = tl.load(values + places, mask=inside).to(tl.float32)
    if HAS_SCALE:
        x *= tl.load(scale + places % width, mask=inside, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + places % width, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + places, _rounded(_activated(x, alpha, KIND, False), inverse, output, QUANTISED), mask=inside)


@triton.jit
def _attended(
    queries,
    keys,
    mask,
    begin,
    columns,
    count,
    tokens,
    query_stride,
    key_stride,
    scale,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One head's attention for BLOCK_Q queries from `begin` on, in float32; softmax is taken block by block of keys.

    A row holds keys, and values WIDTH behind them; `columns` are the head's.
    """
    query = begin + tl.arange(0, BLOCK_Q)
    q = tl.load(queries + query[:, None] * query_stride + columns[None, :], mask=query[:, None] < count, other=0.0)
    highest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    weights = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, columns.shape[0]), tl.float32)
    end = tokens
    if CAUSAL:
        end = tl.minimum(tokens, begin + BLOCK_Q)
    for start in range(0, end, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        place = keys + key[:, None] * key_stride + columns[None, :]
        k = tl.load(place, mask=key[:, None] < tokens, other=0.0)
        v = tl.load(place + WIDTH, mask=key[:, None] < tokens, other=0.0)
        seen = key[None, :] < tokens
        if CAUSAL:
            seen = seen & (key[None, :] <= query[:, None])
        if HAS_MASK:
            seen = seen & (tl.load(mask + key, mask=key < tokens, other=0) != 0)[None, :]
        scores = tl.where(seen, tl.dot(q, k.T) * scale, -float("inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        top = above
        if HAS_MASK:  # a block may be masked as a whole
            top = tl.where(above == -float("inf"), 0.0, above)
        shrink, shares = tl.exp2(highest - top), tl.exp2(scores - top[:, None])
        weights = weights * shrink + tl.sum(shares, 1)
        total = tl.dot(shares.to(v.dtype), v, total * shrink[:, None])
        highest = above
    return total / weights[:, None]


@triton.jit
def _attention(
    queries,
    keys,
    mask,
    output,
    count,
    tokens,
    query_stride,
    key_stride,
    scale,
    inverse,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One head of one row's attention for BLOCK_Q queries."""
    _take_turn(DEPENDENT)
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    width: tl.constexpr = HEADS * HEAD
    columns = head * HEAD + tl.arange(0, HEAD)
    if HAS_MASK:
        mask += batch * tokens
    found = _attended(
        queries + batch * count * query_stride,
        keys + batch * tokens * key_stride,
        mask,
        tl.program_id(0) * BLOCK_Q,
        columns,
        count,
        tokens,
        query_stride,
        key_stride,
        scale,
        width,
        CAUSAL,
        HAS_MASK,
        BLOCK_Q,
        BLOCK_K,
    )
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    place = output + (batch * count + query[:, None]) * width + columns[None, :]
    tl.store(place, _rounded(found, inverse, output, QUANTISED), mask=query[:, None] < count)


@triton.jit
def _skip_layer_norm(
    hidden,
    skip,
    added,
    gain,
    shift,
    normalized,
    total,
    ratios,
    skips,
    width,
    apart,
    epsilon,
    inverse,
    PARTS: tl.constexpr,
    HAS_RATIOS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row: the sum of the PARTS of `hidden`, `apart` from each other, of skip and of what is added, normalised.

    `hidden` is multiplied by `ratios` [width] first. `skip` begins anew after `skips` rows.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.program_id(0).to(tl.int64)
    place = row * width + columns
    stretch = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)  # no kernel writes these: no need to wait
    if HAS_SHIFT:
        move = tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        more = tl.load(added + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RATIOS:
        ratio = tl.load(ratios + columns, mask=inside, other=0.0)
    _take_turn(DEPENDENT)
    x = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(hidden + part * apart + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_RATIOS:
        x *= ratio
    x += tl.load(skip + row % skips * width + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        x += more
    tl.store(total + place, x.to(total.dtype.element_ty), mask=inside)
    x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    x *= stretch
    if HAS_SHIFT:
        x += move
    tl.store(normalized + place, _rounded(x, inverse, normalized, QUANTISED), mask=inside)


@dataclass(frozen=True)
class Tiles:
    """How a matmul is tiled: a program's tile, and how it is pipelined."""

    m: int
    n: int
    k: int
    stages: int
    warps: int
    together: int = 1  # programs on a multiprocessor
    descriptors: bool = True  # tiles are copied by the GPU's engine for that

    def __str__(self) -> str:
        shown = f"{self.m} x {self.n} x {self.k}, {self.stages} stages, {self.warps} warps, {self.together} together"
        return shown if self.descriptors else f"{shown}, no descriptors"

    def divides(self, depth: int, fp8: bool, parts: int = 1) -> bool:
        """Whether a matmul of this depth, split in parts, is whole steps; in FP8 a step is twice as deep."""
        return depth % ((2 if fp8 else 1) * self.k * parts) == 0


LARGE = (
    Tiles(128, 256, 64, 3, 8),
    Tiles(128, 128, 64, 4, 8),
    Tiles(128, 128, 64, 2, 4, 2),
    Tiles(64, 256, 64, 4, 4),
    Tiles(64, 128, 64, 3, 4, 2),
)
LARGE_FP8 = (*LARGE, Tiles(128, 128, 64, 3, 8, 2), Tiles(64, 256, 64, 2, 4, 2))
SMALL = (Tiles(64, 128, 64, 4, 4), Tiles(64, 64, 128, 4, 4), Tiles(64, 32, 128, 5, 4), Tiles(64, 16, 128, 6, 4))
FEW = (
    Tiles(64, 32, 128, 5, 4, descriptors=False),
    Tiles(64, 32, 128, 3, 4, descriptors=False),
    Tiles(64, 16, 128, 6, 4, descriptors=False),
)
SPLIT = [(tiles, parts) for tiles in (*SMALL[1:3], *FEW[:2]) for parts in (2, 4)]  # a matmul's depth, split in parts
GROUP = 8  # rows of tiles that are taken together
FEW_ROWS = 256  # of a matmul: its time is that of reading the weights
QUERIES = (
    (16, 64, 1),
    (32, 32, 2),
    (32, 128, 4),
    (64, 32, 4),
    (64, 64, 4),
    (128, 128, 8),
    (128, 64, 4),
)  # block of queries, of keys, warps
FEW_QUERIES = (16, 64, 4)  # the same, of one query or a few


def cublas_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    activation: Activation | None,
    inverse: float | None,
) -> Tensor:
    """cuBLAS, and a pass behind it for what it does not do itself: in FP8 it multiplies by one scale."""
    if scale is not None:
        sums, ratios = cublas_fp8_sums(hidden, weight, scale)
        return _pass(sums, ratios, bias, activation, inverse)
    if activation is not None and _form(activation) == "tanh" and bias is not None and inverse is None:
        return torch._addmm_activation(bias, hidden, weight.T, use_gelu=True)
    output = F.linear(hidden, weight, bias)
    if activation is None and inverse is None:
        return output
    return _pass(output, None, None, activation, inverse)


def cublas_fp8_sums(hidden: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The FP8 matmul with the largest of the scales, in float16, and the ratio [out] that each output lacks."""
    largest, ratios, one = _split(scale)
    sums = torch._scaled_mm(hidden, weight.T, one, largest, out_dtype=torch.float16, use_fast_accum=True)
    return sums, ratios


_SPLITS = WeakTensorKeyDictionary()  # of scales, made in the first call: a CUDA graph need not make them again


def _split(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest of the scales, all as ratios to it, and a one."""
    if scale not in _SPLITS:
        largest = scale.max()
        _SPLITS[scale] = (largest, scale / largest, torch.ones_like(largest))
    found: tuple[Tensor, Tensor, Tensor] = _SPLITS[scale]
    return found


@cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, 1, device=device)


def cublas_fp8_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    activation: Activation | None,
    inverse: float | None,
) -> Tensor:
    """cuBLAS with a scale for each row and output; a pass behind it where there is more to do."""
    assert scale is not None
    rows = _ones(len(hidden), hidden.device)
    output = torch._scaled_mm(
        hidden, weight.T, rows, scale[None, :], bias=bias, out_dtype=torch.float16, use_fast_accum=True
    )
    return output if activation is None and inverse is None else _pass(output, None, None, activation, inverse)


def _pass(
    values: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
    inverse: float | None,
) -> Tensor:
    """A pass over a matmul's values, [rows, width]; in place unless they become FP8."""
    output = values if inverse is None else torch.empty_like(values, dtype=FP8)
    block = 2048
    _activate[(triton.cdiv(values.numel(), block),)](
        values,
        output,
        scale,
        bias,
        values.shape[-1],
        values.numel(),
        activation.alpha if activation else 1.0,
        inverse or 1.0,
        _form(activation),
        scale is not None,
        bias is not None,
        inverse is not None,
        block,
        **_launch(),
    )
    return output


def quantise(hidden: Tensor, inverse: float) -> Tensor:
    """FP8 values of hidden * inverse."""
    return _pass(hidden.contiguous(), None, None, None, inverse)


def triton_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    activation: Activation | None,
    inverse: float | None,
    tiles: Tiles,
) -> Tensor:
    """One kernel for matmul, scale, bias, activation and rounding."""
    dtype = FP8 if inverse is not None else hidden.dtype if scale is None else torch.float16
    output = torch.empty(len(hidden), len(weight), dtype=dtype, device=hidden.device)
    return _launch_matmul(hidden, weight, bias, scale, activation, inverse, tiles, output)


def _launch_matmul(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    activation: Activation | None,
    inverse: float | None,
    tiles: Tiles,
    output: Tensor,
    parts: int = 1,
) -> Tensor:
    (count, depth), width = hidden.shape, len(weight)
    tiles = tiles if hidden.dtype is not FP8 else replace(tiles, k=2 * tiles.k)  # as many bytes
    items = triton.cdiv(count, tiles.m) * triton.cdiv(width, tiles.n) * parts
    values = (bias, scale, count, width, depth, activation.alpha if activation else 1.0, inverse or 1.0)
    kind = (
        *_lines(weight, count, parts),
        _form(activation),
        bias is not None,
        scale is not None,
        inverse is not None,
        inverse is not None and hidden.is_cuda,
    )
    blocks = (tiles.m, tiles.n, tiles.k)
    settings = {"num_stages": tiles.stages, "num_warps": tiles.warps, **_launch()}
    if tiles.descriptors:
        described = (
            TensorDescriptor.from_tensor(hidden, [tiles.m, tiles.k]),
            TensorDescriptor.from_tensor(weight, [tiles.n, tiles.k]),
            TensorDescriptor.from_tensor(output, [tiles.m, tiles.n]),
        )
        programs = min(tiles.together * _multiprocessors(), items)
        _matmul[(programs,)](*described, *values, weight, *kind, *blocks, GROUP, parts, **settings)
    else:
        _matmul_of_few[(items,)](hidden, weight, output, *values, *kind, *blocks, parts, **settings)
    return output


def _lines(weight: Tensor, rows: int, parts: int) -> tuple[int, int]:
    """Bytes of a row of weights, and lines of the cache of a part; 0 lines where they are not asked for ahead."""
    size = weight.shape[1] * weight.element_size()
    ahead = rows <= FEW_ROWS and _launch()["DEPENDENT"]
    return size, triton.next_power_of_2(triton.cdiv(size, 128 * parts)) if ahead else 0


def _form(activation: Activation | None) -> str:
    if activation is None:
        return ""
    return "QuickGelu" if activation.kind == "QuickGelu" else {"tanh": "tanh", "none": "erf"}[activation.form]


@cache
def _launch() -> dict[str, Any]:
    """How kernels are launched on this GPU."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


def _multiprocessors() -> int:
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 4


def attention(
    packed: Tensor,
    heads: int,
    scale: float,
    causal: bool,
    inverse: float | None = None,
    *,
    blocks: tuple[int, int, int],
) -> Tensor:
    """Attention of all heads at once, as torch.nn.functional.scaled_dot_product_attention.

    Args:
        packed: [batch, tokens, 3 * width]: queries, keys and values.
        scale: of products of queries with keys.
        causal: whether a token attends to those before it alone.
        inverse: one over the scale of an output in FP8; None for an output in packed's dtype.
        blocks: queries and keys of one program, and its warps.

    Returns [batch, tokens, width] in packed's dtype, or in FP8.
    """
    width = packed.shape[-1] // 3
    return _launch_attention(packed, packed[..., width:], None, width, heads, scale, causal, inverse, blocks)


def pooled_attention(
    queries: Tensor, keys: Tensor, mask: Tensor | None, heads: int, scale: float, inverse: float | None = None
) -> Tensor:
    """Attention of few queries [batch, count, width] to keys and values, [batch, tokens, 2 * width].

    `mask`: int32 [batch, tokens], 0 where a token is not seen; one at least is. Returns [batch, count, width] in the
    queries' dtype, or in FP8.
    """
    return _launch_attention(queries, keys, mask, queries.shape[-1], heads, scale, False, inverse, FEW_QUERIES)


def _launch_attention(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    width: int,
    heads: int,
    scale: float,
    causal: bool,
    inverse: float | None,
    blocks: tuple[int, int, int],
) -> Tensor:
    (batch, count, query_stride), tokens, key_stride = queries.shape, keys.shape[1], keys.stride(1)
    output = torch.empty(batch, count, width, dtype=queries.dtype if inverse is None else FP8, device=queries.device)
    block, keys_of_block, warps = blocks
    _attention[(triton.cdiv(count, block), batch * heads)](
        queries,
        keys,
        mask,
        output,
        count,
        tokens,
        query_stride,
        key_stride,
        scale * LOG2_E,
        inverse or 1.0,
        heads,
        width // heads,
        causal,
        mask is not None,
        inverse is not None,
        block,
        keys_of_block,
        num_warps=warps,
        **_launch(),
    )
    return output


def patchify(pixels: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Pixels [images, channels, height, width] as patches [images, patches, channels * tall * wide] in `dtype`."""
    images, channels, height, width = pixels.shape
    tall, wide = size
    count, long = height // tall * (width // wide), channels * tall * wide
    patches = torch.empty(images, count, long, dtype=dtype, device=pixels.device)
    block = triton.next_power_of_2(long)
    _patchify[(count, images)](
        pixels.contiguous(), patches, width // wide, channels, tall, wide, block, num_warps=8, **_launch()
    )
    return patches


def linear_skip_layer_norm(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    skip: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    added: Tensor | None,
    epsilon: float,
    inverse: float | None,
    tiles: Tiles,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """The matmul's depth is split in parts, for more programs where there are few rows; what normalises sums them."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    height = triton.cdiv(len(flat), tiles.m) * tiles.m
    sums = torch.empty(parts * height, len(weight), dtype=torch.float32, device=hidden.device)
    _launch_matmul(flat, weight, None, scale, None, None, tiles, sums, parts)
    return skip_layer_norm(sums, skip, gain, shift, added, epsilon, inverse, parts)


def fp8_linear_skip_layer_norm(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor,
    skip: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    added: Tensor | None,
    epsilon: float,
    inverse: float | None,
) -> tuple[Tensor, Tensor]:
    """cuBLAS with one scale; what normalises multiplies by the ratios of each output's."""
    sums, ratios = cublas_fp8_sums(hidden.reshape(-1, hidden.shape[-1]), weight, scale)
    return skip_layer_norm(sums, skip, gain, shift, added, epsilon, inverse, ratios=ratios)


def skip_layer_norm(
    hidden: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    epsilon: float,
    inverse: float | None = None,
    parts: int = 1,
    ratios: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The normalised sum, and the sum; where `hidden` is `parts` below one another, of all of them.

    `skip` may be one row's of a batch, [1, tokens, width], where `hidden` is no part.
    """
    width = skip.shape[-1]
    like = hidden if parts == 1 and ratios is None else skip
    normalized, total = torch.empty_like(like, dtype=skip.dtype if inverse is None else FP8), torch.empty_like(like)
    _skip_layer_norm[(like.numel() // width,)](
        hidden,
        skip,
        added,
        weight,
        bias,
        normalized,
        total,
        ratios,
        skip.numel() // width,
        width,
        hidden.numel() // parts,
        epsilon,
        inverse or 1.0,
        parts,
        ratios is not None,
        added is not None,
        bias is not None,
        inverse is not None,
        triton.next_power_of_2(width),
        num_warps=4,
        **_launch(),
    )
    return normalized, total
