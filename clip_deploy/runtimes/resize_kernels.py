"""Kernels for NVIDIA GPUs, in Triton, that resize a batch of images of many sizes as Pillow does.

One resizes along lines, and rounds to grey levels; the other across them, and rounds and normalises. Both read of each
image, from one table [entries, images] of int64: where it lies; the bytes to the next line and to the next pixel of a
line; the lengths across and along the lines, in the order of each pair, of the image, of what is resized, of where the
crop begins, of the crop; the numbers to the next in the result; and its first line in what the first kernel writes.
"""

import triton
import triton.language as tl


@triton.jit
def _weight(x, TAPS: tl.constexpr):
    """The filter at `x` pixels from its middle, as Pillow's: a triangle, Catmull and Rom's cubic, or Lanczos's."""
    x = tl.abs(x)
    if TAPS == 1:
        found = tl.maximum(1.0 - x, 0.0)
    elif TAPS == 2:
        near = ((1.5 * x - 2.5) * x) * x + 1.0
        found = tl.where(x < 1.0, near, tl.where(x < 2.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5, 0.0))
    else:
        angle = tl.maximum(x, 1e-6) * 3.141592653589793
        found = tl.where(x < 3.0, 3.0 * tl.sin(angle) * tl.sin(angle / 3.0) / (angle * angle), 0.0)
    return found


@triton.jit
def _levels(total, weights):
    """Whole grey levels of weighted sums, rounded as Pillow does."""
    return tl.floor(tl.clamp(total / weights + 0.5, 0.0, 255.0))


@triton.jit
def _entry(table, count, KIND: tl.constexpr):
    """One of the table's numbers, of this program's image."""
    return tl.load(table + KIND * count + tl.program_id(1))


@triton.jit
def resize_first(table, half, count, LONGEST: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr):
    """half [all images' lines, 3, LONGEST]: each line resized along itself, and cropped."""
    height = _entry(table, count, 3).to(tl.int32)
    first = tl.program_id(0) * ROWS
    if first < height:
        source = _entry(table, count, 0).to(tl.pointer_type(tl.uint8))
        down, across = _entry(table, count, 1), _entry(table, count, 2)
        width = _entry(table, count, 4).to(tl.int32)
        resized = _entry(table, count, 6).to(tl.int32)
        left = _entry(table, count, 8).to(tl.int32)
        wanted = _entry(table, count, 10).to(tl.int32)
        start = _entry(table, count, 13)
        y, x = first + tl.arange(0, ROWS), tl.arange(0, LONGEST)
        place = x + left
        inside = (x < wanted) & (place >= 0) & (place < resized)
        scale = width.to(tl.float32) / resized
        stretch = tl.maximum(scale, 1.0)
        middle = (place + 0.5) * scale
        begin = tl.maximum((middle - TAPS * stretch + 0.5).to(tl.int32), 0)
        end = tl.minimum((middle + TAPS * stretch + 0.5).to(tl.int32), width)
        red = tl.zeros((ROWS, LONGEST), tl.float32)
        green = tl.zeros((ROWS, LONGEST), tl.float32)
        blue = tl.zeros((ROWS, LONGEST), tl.float32)
        weights = tl.zeros((LONGEST,), tl.float32)
        line = source + y[:, None].to(tl.int64) * down
        for tap in range((2 * TAPS * stretch).to(tl.int32) + 2):
            at = begin + tap
            counts = inside & (at < end)
            weight = tl.where(counts, _weight((at - middle + 0.5) / stretch, TAPS), 0.0)
            weights += weight
            pixel = line + at[None, :].to(tl.int64) * across
            mask = counts[None, :] & (y[:, None] < height)
            red += weight[None, :] * tl.load(pixel, mask=mask, other=0).to(tl.float32)
            green += weight[None, :] * tl.load(pixel + 1, mask=mask, other=0).to(tl.float32)
            blue += weight[None, :] * tl.load(pixel + 2, mask=mask, other=0).to(tl.float32)
        weights = tl.where(inside, weights, 1.0)[None, :]
        output = half + (start + y[:, None]) * (3 * LONGEST) + x[None, :]
        mask = inside[None, :] & (y[:, None] < height)
        tl.store(output, _levels(red, weights).to(tl.uint8), mask=mask)
        tl.store(output + LONGEST, _levels(green, weights).to(tl.uint8), mask=mask)
        tl.store(output + 2 * LONGEST, _levels(blue, weights).to(tl.uint8), mask=mask)


@triton.jit
def resize_second(
    table,
    half,
    pixels,
    scales,
    count,
    size,
    fill,
    LONGEST: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """pixels [images, 3, size]: `half` resized across its lines, cropped and normalised."""
    channel = tl.program_id(2)
    height = _entry(table, count, 3).to(tl.int32)
    rows, columns = _entry(table, count, 5).to(tl.int32), _entry(table, count, 6).to(tl.int32)
    top, left = _entry(table, count, 7).to(tl.int32), _entry(table, count, 8).to(tl.int32)
    tall, wide = _entry(table, count, 9).to(tl.int32), _entry(table, count, 10).to(tl.int32)
    down, across = _entry(table, count, 11).to(tl.int32), _entry(table, count, 12).to(tl.int32)
    start = _entry(table, count, 13)
    y, x = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LONGEST)
    place = y + top
    inside = (y < tall) & (place >= 0) & (place < rows)
    along = (x < wide) & (x + left >= 0) & (x + left < columns)
    scale = height.to(tl.float32) / rows
    stretch = tl.maximum(scale, 1.0)
    middle = (place + 0.5) * scale
    begin = tl.maximum((middle - TAPS * stretch + 0.5).to(tl.int32), 0)
    end = tl.minimum((middle + TAPS * stretch + 0.5).to(tl.int32), height)
    total = tl.zeros((ROWS, LONGEST), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    for tap in range((2 * TAPS * stretch).to(tl.int32) + 2):
        at = begin + tap
        counts = inside & (at < end)
        weight = tl.where(counts, _weight((at - middle + 0.5) / stretch, TAPS), 0.0)
        weights += weight
        source = half + ((start + at[:, None]) * 3 + channel) * LONGEST + x[None, :]
        value = tl.load(source, mask=counts[:, None] & along[None, :], other=0)
        total += weight[:, None] * value.to(tl.float32)
    levels = _levels(total, tl.where(inside, weights, 1.0)[:, None])
    levels = tl.where(inside[:, None] & along[None, :], levels, fill)
    values = levels * tl.load(scales + channel) + tl.load(scales + 3 + channel)
    output = pixels + (tl.program_id(1).to(tl.int64) * 3 + channel) * size + y[:, None] * down + x[None, :] * across
    tl.store(output, values, mask=(y[:, None] < tall) & (x[None, :] < wide))
