"""Kernels for NVIDIA GPUs, in Triton (https://triton-lang.org), for what the libraries leave in several passes.

An encoder's matmuls are short (a width of 512 to 1,024), so what stands between them, reading and writing every row,
takes long beside them. One kernel multiplies, adds the bias and applies the activation; one attends straight from the
packed matmul; one adds the skip connection and normalises; one cuts an image into patches.

Kernels of a few microseconds follow one another faster where the next is started while the last one runs and waits for
it on the GPU (programmatic dependent launch, from Hopper on: DEPENDENT). Each waits before it touches memory.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from clip_deploy.onnx_graph.torch_module import Activation

LOG2_E = 1.4426950408889634


@triton.jit
def _activated(x, alpha, KIND: tl.constexpr):
    if KIND == "QuickGelu":
        x = x * tl.sigmoid(alpha * x)
    elif KIND == "tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "erf":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _take_turn(DEPENDENT: tl.constexpr):
    """Wait for the kernel before, and let the one behind come up."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit(do_not_specialize=["M"])
def _matmul(
    hidden,
    weight,
    output,
    bias,
    M,
    N,
    K,
    alpha,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """output [M, N] = activation(hidden [M, K] @ weight [N, K].T + bias), by programs that take tile after tile.

    Where K is cut into PARTS, the sums over each stand below one another, in rows of whole tiles.
    """
    _take_turn(DEPENDENT)
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K * PARTS)
    for item in tl.range(tl.program_id(0), down * across * PARTS, tl.num_programs(0), flatten=True):
        part, tile = item // (down * across), item % (down * across)
        first = tile // (GROUP * across) * GROUP  # tiles that share weights are taken together
        height = tl.minimum(down - first, GROUP)
        row = (first + tile % (GROUP * across) % height) * BLOCK_M
        column = tile % (GROUP * across) // height * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            left = hidden.load([row, (part * steps + step) * BLOCK_K])
            right = weight.load([column, (part * steps + step) * BLOCK_K])
            total = tl.dot(left, right.T, total)
        if HAS_BIAS:
            columns = column + tl.arange(0, BLOCK_N)
            total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        output.store([part * down * BLOCK_M + row, column], _activated(total, alpha, KIND).to(output.dtype))


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
def _activate(values, count, alpha, KIND: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    _take_turn(DEPENDENT)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    x = tl.load(values + places, mask=inside).to(tl.float32)
    tl.store(values + places, _activated(x, alpha, KIND).to(values.dtype.element_ty), mask=inside)


@triton.jit
def _attention(
    packed,
    output,
    tokens,
    scale,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One head of one row's attention for BLOCK_Q queries; softmax is taken over the keys block by block."""
    _take_turn(DEPENDENT)
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    width: tl.constexpr = HEADS * HEAD
    columns = head * HEAD + tl.arange(0, HEAD)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    packed += batch * tokens * 3 * width
    q = tl.load(packed + query[:, None] * (3 * width) + columns[None, :], mask=query[:, None] < tokens, other=0.0)
    highest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    weights = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, HEAD), tl.float32)
    end = tokens
    if CAUSAL:
        end = tl.minimum(tokens, (tl.program_id(0) + 1) * BLOCK_Q)
    for start in range(0, end, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        place = packed + key[:, None] * (3 * width) + columns[None, :]
        k = tl.load(place + width, mask=key[:, None] < tokens, other=0.0)
        v = tl.load(place + 2 * width, mask=key[:, None] < tokens, other=0.0)
        seen = key[None, :] < tokens
        if CAUSAL:
            seen = seen & (key[None, :] <= query[:, None])
        scores = tl.where(seen, tl.dot(q, k.T) * scale, -float("inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        shrink, shares = tl.exp2(highest - above), tl.exp2(scores - above[:, None])
        weights = weights * shrink + tl.sum(shares, 1)
        total = tl.dot(shares.to(v.dtype), v, total * shrink[:, None])
        highest = above
    output += batch * tokens * width
    place = output + query[:, None] * width + columns[None, :]
    tl.store(place, (total / weights[:, None]).to(output.dtype.element_ty), mask=query[:, None] < tokens)


@triton.jit
def _skip_layer_norm(
    hidden,
    skip,
    added,
    gain,
    shift,
    normalized,
    total,
    width,
    apart,
    epsilon,
    PARTS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row: the sum of the PARTS of `hidden`, `apart` from each other, of skip and of what is added, normalised."""
    _take_turn(DEPENDENT)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(hidden + part * apart + place, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(skip + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        x += tl.load(added + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + place, x.to(total.dtype.element_ty), mask=inside)
    x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    x *= tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        x += tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normalized + place, x.to(normalized.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tiles:
    """How a matmul is tiled: a program's tile, and how it is pipelined."""

    m: int
    n: int
    k: int
    stages: int
    warps: int
    together: int = 1  # programs on a multiprocessor

    def __str__(self) -> str:
        return f"{self.m} x {self.n} x {self.k}, {self.stages} stages, {self.warps} warps, {self.together} together"


LARGE = (
    Tiles(128, 256, 64, 3, 8),
    Tiles(128, 128, 64, 4, 8),
    Tiles(128, 128, 64, 2, 4, 2),
    Tiles(64, 256, 64, 4, 4),
    Tiles(64, 128, 64, 3, 4, 2),
)
SMALL = (Tiles(64, 128, 64, 4, 4), Tiles(64, 64, 128, 4, 4), Tiles(64, 32, 128, 5, 4), Tiles(64, 16, 128, 6, 4))
SPLIT = [(tiles, parts) for tiles in SMALL[:3] for parts in (2, 4)]  # a matmul's depth, split in parts
GROUP = 8  # rows of tiles that are taken together
QUERIES = (
    (16, 64, 1),
    (32, 32, 2),
    (32, 128, 4),
    (64, 64, 4),
    (128, 128, 8),
    (128, 64, 4),
)  # block of queries, of keys, warps


def cublas_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    """cuBLAS, and a pass for the activation behind it."""
    if activation is not None and _form(activation) == "tanh" and bias is not None:
        return torch._addmm_activation(bias, hidden, weight.T, use_gelu=True)
    output = F.linear(hidden, weight, bias)
    if activation is not None:
        block = 2048
        grid = (triton.cdiv(output.numel(), block),)
        _activate[grid](output, output.numel(), activation.alpha, _form(activation), block, **_launch())
    return output


def triton_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None, tiles: Tiles
) -> Tensor:
    """One kernel for matmul, bias and activation."""
    output = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    return _launch_matmul(hidden, weight, bias, activation, tiles, output)


def _launch_matmul(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    tiles: Tiles,
    output: Tensor,
    parts: int = 1,
) -> Tensor:
    (count, depth), width = hidden.shape, len(weight)
    items = triton.cdiv(count, tiles.m) * triton.cdiv(width, tiles.n) * parts
    programs = min(tiles.together * _multiprocessors(), items)
    _matmul[(programs,)](
        TensorDescriptor.from_tensor(hidden, [tiles.m, tiles.k]),
        TensorDescriptor.from_tensor(weight, [tiles.n, tiles.k]),
        TensorDescriptor.from_tensor(output, [tiles.m, tiles.n]),
        bias,
        count,
        width,
        depth,
        activation.alpha if activation else 1.0,
        _form(activation),
        bias is not None,
        tiles.m,
        tiles.n,
        tiles.k,
        GROUP,
        parts,
        num_stages=tiles.stages,
        num_warps=tiles.warps,
        **_launch(),
    )
    return output


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


def attention(packed: Tensor, heads: int, scale: float, causal: bool, blocks: tuple[int, int, int]) -> Tensor:
    """Attention of all heads at once, as torch.nn.functional.scaled_dot_product_attention.

    Args:
        packed: [batch, tokens, 3 * width]: queries, keys and values.
        scale: of products of queries with keys.
        causal: whether a token attends to those before it alone.
        blocks: queries and keys of one program, and its warps.

    Returns [batch, tokens, width] in packed's dtype.
    """
    batch, tokens, width = packed.shape
    output = torch.empty(batch, tokens, width // 3, dtype=packed.dtype, device=packed.device)
    queries, keys, warps = blocks
    grid = (triton.cdiv(tokens, queries), batch * heads)
    head = width // 3 // heads
    _attention[grid](
        packed, output, tokens, scale * LOG2_E, heads, head, causal, queries, keys, num_warps=warps, **_launch()
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
    skip: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    added: Tensor | None,
    epsilon: float,
    tiles: Tiles,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """The matmul's depth is split in parts, for more programs where there are few rows; what normalises sums them."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    height = triton.cdiv(len(flat), tiles.m) * tiles.m
    sums = torch.empty(parts * height, len(weight), dtype=torch.float32, device=hidden.device)
    _launch_matmul(flat, weight, None, None, tiles, sums, parts)
    return skip_layer_norm(sums, skip, gain, shift, added, epsilon, parts)


def skip_layer_norm(
    hidden: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    epsilon: float,
    parts: int = 1,
) -> tuple[Tensor, Tensor]:
    """The normalised sum, and the sum; where `hidden` is `parts` below one another, of all of them."""
    width = skip.shape[-1]
    normalized, total = torch.empty_like(skip), torch.empty_like(skip)
    _skip_layer_norm[(skip.numel() // width,)](
        hidden,
        skip,
        added,
        weight,
        bias,
        normalized,
        total,
        width,
        hidden.numel() // parts,
        epsilon,
        parts,
        added is not None,
        bias is not None,
        triton.next_power_of_2(width),
        num_warps=4,
        **_launch(),
    )
    return normalized, total
