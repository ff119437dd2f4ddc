"""`tiles` on a GPU: one kernel for each of its functions, which say what the arguments mean.

A program of `_fold` and `_embed` has one row to itself and goes over it twice: for the peak, and for what
is relative to it. The second time its products come from the L2 cache, so each is read from memory once.
Sums stay in as many lanes as a block has, and are added up once at the end. Every element is written by the
program that read it, after it was read: `out` may be `tile`.

None is a value at compile time, as are gain and ceiling: Triton would pass a float in float32.
"""

# Triton's kernels have no types.
# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator,import-untyped"

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from tasft.loss.tiles import Chunk, Running

_BLOCK = 4096  # Columns at a time: with 512 threads, two loads of 16 bytes for each thread.
_COLUMNS_PER_WARP = 256


def fold(
    tile: Float[Tensor, "K R C"], out: Float[Tensor, "K R C"], running: Running, chunk: Chunk, *, entropy: bool
) -> Float[Tensor, " R"]:
    """As `tiles.fold`."""
    decay = torch.empty_like(running.peak)
    with torch.cuda.device_of(tile):
        _fold[(tile.shape[1],)](tile, out, *running, decay, **_options(tile, chunk), ENTROPY=entropy)
    return decay


def embed(
    tile: Float[Tensor, "1 R C"], out: Float[Tensor, "1 R C"], running: Running, chunk: Chunk
) -> Float[Tensor, " R"]:
    """As `tiles.embed`."""
    decay = torch.empty_like(running.peak)
    with torch.cuda.device_of(tile):
        _embed[(tile.shape[1],)](tile, out, *running[:3], decay, **_options(tile, chunk))
    return decay


def unfold(
    tile: Float[Tensor, "K R C"],
    out: Float[Tensor, "R C"],
    running: Running,
    chunk: Chunk,
    odds: Float[Tensor, " R"],
    base: Float[Tensor, " R"],
) -> None:
    """As `tiles.unfold`."""
    options = _options(tile, chunk)
    grid = tile.shape[1], triton.cdiv(tile.shape[2], options["BLOCK"])
    with torch.cuda.device_of(tile):
        # Autograd may hand in one number expanded to all rows.
        _unfold[grid](tile, out, *running[:2], odds.contiguous(), base.contiguous(), **options)


def _options(tile: Float[Tensor, "K R C"], chunk: Chunk) -> dict[str, Any]:
    """Arguments that the kernels have in common."""
    parts, rows, columns = tile.shape
    block = min(triton.next_power_of_2(columns), _BLOCK)
    return {
        "label": chunk.label,
        "bias": chunk.bias,
        "inverse_norm": chunk.inverse_norm,
        "along": chunk.along,
        "scale": chunk.scale,
        "offset": chunk.offset,
        "part": rows * columns,
        "columns": columns,
        "PARTS": parts,
        "GAIN": chunk.gain,
        "CEILING": chunk.ceiling,
        "BLOCK": block,
        "num_warps": max(block // _COLUMNS_PER_WARP, 1),
    }


@triton.jit
def _fold(
    tile,
    out,
    peak,
    mass,
    moment,
    disorder,
    decay,
    label,
    bias,
    inverse_norm,
    along,
    scale,
    offset,
    part,
    columns,
    PARTS: tl.constexpr,
    GAIN: tl.constexpr,
    CEILING: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile += row * columns
    out += row * columns
    token = tl.load(label + row)
    before = tl.load(peak + row)
    mass_before = tl.load(mass + row)
    moment_before = tl.load(moment + row)
    disorder_before = tl.load(disorder + row)
    top = _peak(tile, before, token, bias, columns, GAIN, CEILING, BLOCK)
    masses = tl.full([BLOCK], 0.0, tile.dtype.element_ty)
    moments = masses
    disorders = masses
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z, slope = _logits(tile, column, token, bias, columns, GAIN, CEILING)
        weight = tl.exp(z - top)
        masses += weight
        if ENTROPY:
            disorders += tl.where(weight > 0, top - z, 0.0) * weight
        if PARTS == 2:
            affinity = _affinity(tile + part, column, row, inverse_norm, along, scale, offset, columns)
            affinity *= weight
            moments += affinity
            tl.store(out + part + column, (affinity * slope).to(out.dtype.element_ty), mask=column < columns)
        tl.store(out + column, (weight * slope).to(out.dtype.element_ty), mask=column < columns)
    shrink = tl.exp(before - top)
    tl.store(decay + row, shrink)
    tl.store(peak + row, top)
    tl.store(mass + row, mass_before * shrink + tl.sum(masses, 0))
    if PARTS == 2:
        tl.store(moment + row, moment_before * shrink + tl.sum(moments, 0))
    if ENTROPY:
        risen = (disorder_before + (top - before) * mass_before) * shrink
        tl.store(disorder + row, risen + tl.sum(disorders, 0))


@triton.jit
def _embed(
    tile,
    out,
    peak,
    mass,
    moment,
    decay,
    label,
    bias,
    inverse_norm,
    along,
    scale,
    offset,
    part,
    columns,
    PARTS: tl.constexpr,
    GAIN: tl.constexpr,
    CEILING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile += row * columns
    out += row * columns
    token = tl.load(label + row)
    before = tl.load(peak + row)
    mass_before = tl.load(mass + row)
    moment_before = tl.load(moment + row)
    top = _peak(tile, before, token, bias, columns, GAIN, CEILING, BLOCK)
    masses = tl.full([BLOCK], 0.0, tile.dtype.element_ty)
    moments = masses
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z, _ = _logits(tile, column, token, bias, columns, GAIN, CEILING)
        weight = tl.exp(z - top)
        masses += weight
        norms = tl.load(inverse_norm + column, mask=column < columns, other=0.0)
        rounded = (weight * norms).to(out.dtype.element_ty)
        moments += rounded.to(tile.dtype.element_ty)
        tl.store(out + column, rounded, mask=column < columns)
    shrink = tl.exp(before - top)
    tl.store(decay + row, shrink)
    tl.store(peak + row, top)
    tl.store(mass + row, mass_before * shrink + tl.sum(masses, 0))
    tl.store(moment + row, moment_before * shrink + tl.sum(moments, 0))


@triton.jit
def _unfold(
    tile,
    out,
    peak,
    mass,
    odds,
    base,
    label,
    bias,
    inverse_norm,
    along,
    scale,
    offset,
    part,
    columns,
    PARTS: tl.constexpr,
    GAIN: tl.constexpr,
    CEILING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile += row * columns
    token = tl.load(label + row)
    z, slope = _logits(tile, column, token, bias, columns, GAIN, CEILING)
    worth = tl.full([BLOCK], 0.0, tile.dtype.element_ty) - tl.load(base + row)
    if PARTS == 2:
        worth += _affinity(tile + part, column, row, inverse_norm, along, scale, offset, columns)
    worth *= tl.exp(z - tl.load(peak + row)) / tl.load(mass + row)
    worth = tl.where(column == token, tl.load(odds + row), worth) * slope * GAIN
    tl.store(out + row * columns + column, worth.to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def _peak(tile, before, token, bias, columns, GAIN: tl.constexpr, CEILING: tl.constexpr, BLOCK: tl.constexpr):
    highest = tl.full([BLOCK], float("-inf"), tile.dtype.element_ty)
    for start in range(0, columns, BLOCK):
        z, _ = _logits(tile, start + tl.arange(0, BLOCK), token, bias, columns, GAIN, CEILING)
        highest = tl.maximum(highest, z)
    return tl.maximum(tl.max(highest, 0), before)


@triton.jit
def _logits(tile, column, token, bias, columns, GAIN: tl.constexpr, CEILING: tl.constexpr):
    """Logits, -inf for the label and behind the end, and their slope over gain."""
    z = tl.load(tile + column, mask=column < columns, other=0.0)
    if bias is not None:
        z += tl.load(bias + column, mask=column < columns, other=0.0)
    if CEILING is None:
        z *= GAIN
        slope = tl.full(z.shape, 1.0, z.dtype)
    else:
        z *= GAIN / CEILING
        # Neither overflows nor loses the slope where tanh rounds to 1, as 1 - tanh^2 would.
        shrunk = tl.exp(-2 * tl.abs(z))
        inverse = 1 / (1 + shrunk)
        tanh = (1 - shrunk) * inverse
        slope = 4 * shrunk * inverse * inverse
        z = tl.where(z < 0, -tanh, tanh) * CEILING
    return tl.where((column < columns) & (column != token), z, float("-inf")), slope


@triton.jit
def _affinity(dots, column, row, inverse_norm, along, scale, offset, columns):
    affinity = tl.load(dots + column, mask=column < columns, other=0.0)
    if along is not None:
        affinity -= tl.load(along + column, mask=column < columns, other=0.0)
    if offset is not None:
        affinity -= tl.load(offset + row)
    affinity *= tl.load(inverse_norm + column, mask=column < columns, other=0.0)
    if scale is not None:
        affinity *= tl.load(scale + row)
    return affinity
