"""What is done to one tile, some rows by some tokens, between the matrix products of `scan`.

A tile comes as products: `tile[0]` of the hidden states with a chunk of the head, and `tile[1]`, where
costs are wanted, of some vector for each row with the same chunk of the cost space. It leaves as the
factor of the next product. `tiles_triton` does the same on a GPU, with one kernel for each function.

Shapes: R rows, C tokens of the chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Running(NamedTuple):
    """Sums over the tokens w != y seen so far, relative to their highest logit; updated in place.

    Attributes:
        peak: The highest logit.
        mass: sum exp(z_w - peak).
        moment: sum exp(z_w - peak) affinity_w in `fold`, sum exp(z_w - peak) inverse_norm_w in `embed`.
        disorder: sum -(z_w - peak) exp(z_w - peak), in `fold`.
    """

    peak: Float[Tensor, " R"]
    mass: Float[Tensor, " R"]
    moment: Float[Tensor, " R"]
    disorder: Float[Tensor, " R"]

    @classmethod
    def of(cls, rows: int, dtype: torch.dtype, device: torch.device) -> "Running":
        """Nothing seen. The peak is finite: a chunk that holds nothing but the label must not give nan."""
        peak = torch.full((rows,), torch.finfo(dtype).min, dtype=dtype, device=device)
        return cls(peak, *(torch.zeros_like(peak) for _ in range(3)))


class Chunk(NamedTuple):
    """What a tile's products become logits and costs by.

        z = product * gain, or ceiling * tanh(product * gain / ceiling), of product = tile[0] + bias
        affinity = (tile[1] - along - offset) * inverse_norm * scale

    Attributes:
        label: Index in the chunk of each row's label; outside of 0..C-1 if it is not in it.
        gain: Slope of a logit at 0.
        ceiling: Bound of a logit.
        bias: Of the head, for each token.
        inverse_norm: Of the cost space, for each token.
        along: Of the cost space, for each token; if centred.
        scale: For each row; None is 1.
        offset: For each row; None is 0.
    """

    label: Int[Tensor, " R"]
    gain: float
    ceiling: float | None
    bias: Float[Tensor, " C"] | None
    inverse_norm: Float[Tensor, " C"] | None
    along: Float[Tensor, " C"] | None
    scale: Float[Tensor, " R"] | None
    offset: Float[Tensor, " R"] | None


def fold(
    tile: Float[Tensor, "K R C"], out: Float[Tensor, "K R C"], running: Running, chunk: Chunk, *, entropy: bool
) -> Float[Tensor, " R"]:
    """Weigh the other tokens, and their affinities to the label, for the derivative in the hidden state.

    Args:
        tile: Products; overwritten.
        out: Gets exp(z - peak) dz/dproduct / gain, and that times affinity. May be `tile`.
        running: Takes up mass, moment and, with `entropy`, disorder.
        chunk: What belongs to the tile.
        entropy: Whether disorder is wanted.

    Returns:
        By how much earlier sums shrink, as the peak has risen: exp(peak before - peak).
    """
    slope = logits(tile[0], chunk.bias, chunk.gain, chunk.ceiling)
    decay = _weigh(tile[0], running, chunk)
    if entropy:
        running.disorder.add_(torch.special.entr(tile[0]).sum(1))
    if len(tile) == 2:
        _affinity(tile[1], chunk).mul_(tile[0])
        running.moment.mul_(decay).add_(tile[1].sum(1))
    if slope is not None:
        tile.mul_(slope)
    if out is not tile:
        out.copy_(tile)
    return decay


def embed(
    tile: Float[Tensor, "1 R C"], out: Float[Tensor, "1 R C"], running: Running, chunk: Chunk
) -> Float[Tensor, " R"]:
    """Weigh the other tokens for the sum of their embeddings: `out` gets exp(z - peak) inverse_norm.

    Arguments and result as in `fold`.
    """
    logits(tile[0], chunk.bias, chunk.gain, chunk.ceiling)
    decay = _weigh(tile[0], running, chunk)
    assert chunk.inverse_norm is not None
    tile[0].mul_(chunk.inverse_norm)
    if out is not tile:
        out.copy_(tile)
    # Of the rounded weights, so that what rounding adds to their product leaves with the mean.
    running.moment.mul_(decay).add_(out[0].sum(1, dtype=tile.dtype))
    return decay


def unfold(
    tile: Float[Tensor, "K R C"],
    out: Float[Tensor, "R C"],
    running: Running,
    chunk: Chunk,
    odds: Float[Tensor, " R"],
    base: Float[Tensor, " R"],
) -> None:
    """Derivative in the products: `out` gets q_w (affinity - base) dz/dproduct, and odds dz/dproduct for the label.

    Args:
        tile: Products; overwritten.
        out: Gets the derivative. May be `tile[0]`.
        running: Of the whole vocabulary: q_w = exp(z_w - peak) / mass.
        chunk: What belongs to the tile.
        odds: Derivative of what is minimised in the log-odds of the label.
        base: What is subtracted from every affinity.
    """
    slope = logits(tile[0], chunk.bias, chunk.gain, chunk.ceiling)
    weights = tile[0].sub_(running.peak[:, None]).exp_()
    if len(tile) == 2:
        weights.mul_(_affinity(tile[1], chunk).sub_(base[:, None])).div_(running.mass[:, None])
    else:
        weights.mul_((-base / running.mass)[:, None])
    _set_label(weights, chunk, odds[:, None])
    weights.mul_(chunk.gain if slope is None else slope.mul_(chunk.gain))
    if out.data_ptr() != tile.data_ptr():
        out.copy_(weights)


def diverge(
    tile: Float[Tensor, "2 R C"], out: Float[Tensor, "2 R C"], running: Sequence[Running], chunks: Sequence[Chunk]
) -> Float[Tensor, "2 R"]:
    """Weigh all tokens by two predictions, a model's and an earlier one's, on a GPU too.

    Args:
        tile: Products of each model's hidden states with its head; overwritten.
        out: Gets exp(z - peak) of each, times the slope dz/dproduct / gain of the first. May be `tile`.
        running: Of each; takes up mass, and the second as its moment sum exp(z0_w - peak) (z0_w - z_w).
        chunks: What belongs to the tile of each; no token in them is a label.

    Returns:
        By how much earlier sums of each shrink.
    """
    slope, _ = (logits(z, chunk.bias, chunk.gain, chunk.ceiling) for z, chunk in zip(tile, chunks, strict=True))
    gap = tile[1] - tile[0]
    decay = torch.stack([_weigh(*parts) for parts in zip(tile, running, chunks, strict=True)])
    running[1].moment.mul_(decay[1]).add_(gap.mul_(tile[1]).sum(1))
    if slope is not None:
        tile.mul_(slope)
    if out is not tile:
        out.copy_(tile)
    return decay


def logits(
    product: Float[Tensor, "*R"], bias: Float[Tensor, "*C"] | None, gain: float, ceiling: float | None
) -> Float[Tensor, "*R"] | None:
    """Turn products into logits, in place, as `Chunk` says.

    Returns:
        Slope of the logits in the products, over gain; None where it is 1 throughout.
    """
    if bias is not None:
        product.add_(bias)
    if ceiling is None:
        if gain != 1:
            product.mul_(gain)
        return None
    product.mul_(gain / ceiling).tanh_()
    slope = 1 - product.square()
    product.mul_(ceiling)
    return slope


def _weigh(z: Float[Tensor, "R C"], running: Running, chunk: Chunk) -> Float[Tensor, " R"]:
    """Turn logits into exp(z - peak), 0 for the label, in place; all of `running` but moment is brought up."""
    _set_label(z, chunk, -torch.inf)
    before = running.peak.clone()
    torch.maximum(before, z.amax(1), out=running.peak)
    decay = (before - running.peak).exp_()
    running.disorder.add_((running.peak - before) * running.mass).mul_(decay)
    z.sub_(running.peak[:, None]).exp_()
    running.mass.mul_(decay).add_(z.sum(1))
    return decay


def _affinity(dots: Float[Tensor, "R C"], chunk: Chunk) -> Float[Tensor, "R C"]:
    if chunk.along is not None:
        dots.sub_(chunk.along)
    if chunk.offset is not None:
        dots.sub_(chunk.offset[:, None])
    assert chunk.inverse_norm is not None
    dots.mul_(chunk.inverse_norm)
    return dots if chunk.scale is None else dots.mul_(chunk.scale[:, None])


def _set_label(tile: Float[Tensor, "R C"], chunk: Chunk, value: Float[Tensor, "R 1"] | float) -> None:
    """Overwrite the label's entry in the rows that have it here, without asking the device which those are."""
    inside = ((chunk.label >= 0) & (chunk.label < tile.shape[1]))[:, None]
    index = chunk.label.clamp(0, tile.shape[1] - 1)[:, None]
    tile.scatter_(1, index, torch.where(inside, value, tile.gather(1, index)))
