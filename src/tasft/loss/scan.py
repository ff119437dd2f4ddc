"""One pass over the vocabulary: what a prediction says of the tokens other than the label.

For a label y and logits z over V tokens, with q_w = softmax of z over the tokens w != y alone,

    log_odds = z_y - logsumexp_{w != y} z_w         so Q(y) = sigmoid(log_odds), 1 - Q(y) = sigmoid(-log_odds)
    cost     = sum_{w != y} q_w (1 - <e_w, e_y>)    so EMD  = sigmoid(-log_odds) cost, as y costs itself nothing
    mean     = sum_{w != y} q_w e_w                 so mu - e_y = sigmoid(-log_odds) (mean - e_y)

are exact even where Q(y) rounds to 0 or 1, and every penalty is a function of them. The logits are
never held for all tokens: chunks of the vocabulary are folded into running sums (online softmax,
Milakov and Gimelshein 2018, arXiv 1805.02867), in float32 or, for float64 inputs, float64.

The derivative in the hidden state h, with t_w = dz_w/d<h, W_w>, a_w = <e_w, e_y> and a = 1 - cost its mean,

    d log_odds = t_y W_y - sum_w q_w t_w W_w
    d cost     = sum_w q_w (a - a_w) t_w W_w

is a sum over tokens too, whose normaliser can come later. While the head is frozen it is therefore summed in
the same pass: 8 N V D operations with costs, 4 without, and backward needs neither head nor logits.
A head that is trained, and `mean`, take a second pass in backward.

Shapes: M positions, all of them counted; V tokens, D width of the model, E width of the cost space.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tasft.loss import tiles
from tasft.loss.space import CostSpace
from tasft.loss.tiles import Chunk, Running
from tasft.loss.tokens import Head

# Numbers in a tile. On a CPU it should stay in the cache between two products (8 MiB here; 16 MiB and more were 5 to
# 8% slower, less is as fast on idle cores but suffers from others at work), on a GPU it must be large enough for the
# products to run at full rate.
_TILE = {"cpu": 2**21, "cuda": 2**26}
_LEAST_TOKENS = 128


class Others(NamedTuple):
    """What is known of the tokens other than the label; see the formulas of this module.

    Attributes:
        log_odds: Of the label, in nats.
        cost: Mean cost of the other tokens for the label, in [0, 2]; None without a cost space.
    """

    log_odds: Float[Tensor, " M"]
    cost: Float[Tensor, " M"] | None


class Statistics(NamedTuple):
    """What to look at; without derivative.

    Attributes:
        emd: EMD between prediction and label, in [0, 2].
        entropy: Of the whole prediction Q, in nats, in [0, log V].
        top1: Largest probability in Q.
    """

    emd: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]
    top1: Float[Tensor, " M"]


# A compiled caller breaks its graph here: there are hundreds of chunks to unroll, and nothing to fuse around them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def other_tokens(
    hidden: Float[Tensor, "M D"],
    head: Head,
    labels: Int[Tensor, " M"],
    space: CostSpace | None = None,
    chunk_size: int | None = None,
) -> Others:
    """Log-odds of the label and, given a cost space, the mean cost of the other tokens.

    Args:
        hidden: Final hidden states.
        head: Maps them to logits; weight and bias get gradients if they require them.
        labels: The token at each position, all of them tokens of the head.
        space: The geometry; no gradient reaches it.
        chunk_size: Tokens of the vocabulary taken at a time; changes memory and speed, not the result.

    Raises:
        ValueError: The cost space and the head disagree on the vocabulary.
    """
    _check(head, space)
    if not _is_trained(head):
        derivative = torch.is_grad_enabled() and hidden.requires_grad
        log_odds, cost = _OnePass.apply(  # type: ignore[no-untyped-call]
            hidden, head, labels, space, chunk_size, derivative
        )
        return Others(log_odds, cost)
    log_odds, mean = _TwoPasses.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, labels, space, chunk_size
    )
    cost = None if space is None else 1 - (mean * space.embed(labels).to(mean.dtype)).sum(1)
    return Others(log_odds, cost)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def other_embedding(
    hidden: Float[Tensor, "M D"],
    head: Head,
    labels: Int[Tensor, " M"],
    space: CostSpace,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, " M"], Float[Tensor, "M E"]]:
    """Log-odds of the label and the mean embedding of the other tokens; arguments as in `other_tokens`."""
    _check(head, space)
    log_odds, mean = _TwoPasses.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, labels, space, chunk_size
    )
    return log_odds, mean


@torch.compiler.disable  # type: ignore[untyped-decorator]
def divergence(
    hidden: Float[Tensor, "M D"],
    head: Head,
    before: Float[Tensor, "M D"],
    head_before: Head,
    chunk_size: int | None = None,
) -> Float[Tensor, " M"]:
    """KL(Q0 || Q) from an earlier model's prediction Q0, in nats, in [0, inf).

    With z0 and z their logits, KL = sum_w Q0_w (z0_w - z_w) - logsumexp z0 + logsumexp z, and its derivative in the
    hidden state is sum_w (Q_w - Q0_w) t_w W_w: both are summed in one pass, 8 N V D operations.

    Args:
        hidden: Final hidden states.
        head: Maps them to logits; gets no gradient.
        before: Final hidden states of the earlier model; no gradient reaches them.
        head_before: Its head.
        chunk_size: Tokens of the vocabulary taken at a time; changes memory and speed, not the result.

    Raises:
        ValueError: The head is trained, which is not done here.
    """
    if _is_trained(head):
        raise ValueError("the divergence gives no gradient to a head that is trained")
    derivative = torch.is_grad_enabled() and hidden.requires_grad
    return _Divergence.apply(  # type: ignore[no-untyped-call]
        hidden, head, before, head_before, chunk_size, derivative
    )


@torch.no_grad()
@torch.compiler.disable  # type: ignore[untyped-decorator]
def statistics(
    hidden: Float[Tensor, "M D"],
    head: Head,
    labels: Int[Tensor, " M"],
    space: CostSpace,
    chunk_size: int | None = None,
) -> Statistics:
    """What to watch in a prediction; arguments as in `other_tokens`."""
    _check(head, space)
    scan = _Scan(hidden, head, labels, space, chunk_size)
    running, _ = scan.fold(entropy=True, derivative=False)
    log_odds = scan.own()[0] - running.peak - running.mass.log()
    log_q, log_rest = F.logsigmoid(torch.stack([log_odds, -log_odds]))
    rest = log_rest.exp()
    among_others = running.disorder / running.mass + running.mass.log()
    entropy = rest * (among_others - log_rest) - log_q.exp() * log_q
    top1 = torch.maximum(log_q.exp(), rest / running.mass)
    return Statistics(rest * (1 - running.moment / running.mass), entropy, top1)


def _check(head: Head, space: CostSpace | None) -> None:
    if space is not None and space.matrix.shape[0] != head.weight.shape[0]:
        raise ValueError(f"the cost space has {space.matrix.shape[0]} tokens, the head {head.weight.shape[0]}")


def _is_trained(head: Head) -> bool:
    parts = (head.weight, head.bias)
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)


class _Scan:
    """The loop over chunks of the vocabulary and the products in it; no part of it is differentiated."""

    def __init__(
        self,
        hidden: Float[Tensor, "M D"],
        head: Head,
        labels: Int[Tensor, " M"],
        space: CostSpace | None,
        chunk_size: int | None,
        parts: int | None = None,
    ) -> None:
        device = hidden.device.type
        self.gain, self.ceiling, self.space, self.labels = head.scale, head.softcap, space, labels
        widest = torch.promote_types(hidden.dtype, head.weight.dtype)
        self.dtype = self.factor_dtype = torch.promote_types(widest, torch.float32)
        self.tiles: ModuleType = tiles
        if device == "cuda":
            from tasft.loss import tiles_triton

            self.tiles = tiles_triton
            # A GPU multiplies narrow numbers and adds up in float32. A CPU would round each sum to them.
            autocast = torch.is_autocast_enabled(device)
            self.factor_dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
        self.hidden = hidden.detach().to(self.factor_dtype)
        self.weight = head.weight.detach()
        self.bias = None if head.bias is None else head.bias.detach().to(self.dtype)
        parts = parts or (1 if space is None else 2)
        fitting = _TILE.get(device, _TILE["cuda"]) // max(parts * len(labels), 1)
        # A multiple of it, so that rows of a tile are aligned.
        fitting = max(fitting // _LEAST_TOKENS, 1) * _LEAST_TOKENS
        self.chunk_size = min(chunk_size or fitting, len(self.weight))

    def own(self) -> tuple[Float[Tensor, " M"], Float[Tensor, "M D"]]:
        """Logit of the label, and its derivative in the hidden state."""
        rows = self.weight[self.labels].to(self.dtype)
        z = (self.hidden.to(self.dtype) * rows).sum(1)
        slope = tiles.logits(z, None if self.bias is None else self.bias[self.labels], self.gain, self.ceiling)
        return z, rows.mul_(self.gain if slope is None else slope[:, None] * self.gain)

    def fold(self, *, entropy: bool, derivative: bool) -> tuple[Running, Float[Tensor, "K M D"] | None]:
        """Sums over the other tokens; with `derivative`, of W_w and of affinity times W_w too, over gain and mass."""
        operands, scale, offset = [(self.hidden, self.weight)], None, None
        if self.space is not None:
            operands.append((self.space.matrix[self.labels].to(self.factor_dtype), self.space.matrix))
            scale = self.space.inverse_norm[self.labels].to(self.dtype)
            if self.space.mean is not None and self.space.along is not None:
                offset = (self.space.along[self.labels] - self.space.mean.square().sum()).to(self.dtype)
        total = self.hidden.new_zeros(len(operands), *self.hidden.shape, dtype=self.dtype) if derivative else None
        running = Running.of(len(self.labels), self.dtype, self.hidden.device)
        for tokens, tile, out in self._tiles(operands):
            chunk = self._chunk(tokens, scale, offset, None if self.space is None else self.space.along)
            decay = self.tiles.fold(tile, out, running, chunk, entropy=entropy)
            if total is not None:
                total.mul_(decay[:, None])
                _multiply(total.flatten(0, 1), out.flatten(0, 1), self.weight[tokens], add=True)
        return running, None if total is None else total.div_(running.mass[:, None])

    def diverge(self, before: "_Scan", derivative: bool) -> tuple[list[Running], Float[Tensor, "2 M D"] | None]:
        """Sums over all tokens, weighed as now and as before; with `derivative`, of W_w too, over gain and mass."""
        running = [Running.of(len(self.labels), self.dtype, self.hidden.device) for _ in range(2)]
        total = self.hidden.new_zeros(2, *self.hidden.shape, dtype=self.dtype) if derivative else None
        operands = [(scan.hidden.to(self.factor_dtype), scan.weight) for scan in (self, before)]
        for tokens, tile, out in self._tiles(operands):
            decay = tiles.diverge(tile, out, running, [scan._chunk(tokens) for scan in (self, before)])
            if total is not None:
                total.mul_(decay[..., None])
                _multiply(total.flatten(0, 1), out.flatten(0, 1), self.weight[tokens], add=True)
        if total is not None:
            total.div_(torch.stack([part.mass for part in running])[..., None])
        return running, total

    def embed(self, space: CostSpace) -> tuple[Running, Float[Tensor, "M E"]]:
        """Sums over the other tokens, and their mean embedding."""
        mean = self.hidden.new_zeros(len(self.labels), space.matrix.shape[1], dtype=self.dtype)
        running = Running.of(len(self.labels), self.dtype, self.hidden.device)
        for tokens, tile, out in self._tiles([(self.hidden, self.weight)]):
            decay = self.tiles.embed(tile, out, running, self._chunk(tokens))
            _multiply(mean.mul_(decay[:, None]), out[0], space.matrix[tokens], add=True)
        if space.mean is not None:
            mean.sub_(running.moment[:, None] * space.mean.to(self.dtype))
        return running, mean.div_(running.mass[:, None])

    def unfold(
        self,
        running: Running,
        odds: Float[Tensor, " M"],
        base: Float[Tensor, " M"],
        pull: Float[Tensor, "M E"] | None,
        for_weight: bool,
        for_bias: bool,
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "V D"] | None, Float[Tensor, " V"] | None]:
        """Gradients in hidden states, weight and bias, from those in log-odds and mean embedding (`pull`)."""
        operands, offset = [(self.hidden, self.weight)], None
        if self.space is not None and pull is not None:
            operands.append((pull.to(self.factor_dtype), self.space.matrix))
            offset = None if self.space.mean is None else pull @ self.space.mean.to(self.dtype)
        hidden = torch.zeros_like(self.hidden, dtype=self.dtype)
        weight = torch.empty_like(self.weight) if for_weight else None
        bias = hidden.new_empty(len(self.weight)) if for_bias else None
        for tokens, tile, out in self._tiles(operands):
            self.tiles.unfold(tile, out[0], running, self._chunk(tokens, None, offset), odds, base)
            _multiply(hidden, out[0], self.weight[tokens], add=True)
            if weight is not None:
                part = hidden.new_empty(out.shape[2], hidden.shape[1])
                _multiply(part, out[0].T, self.hidden)
                weight[tokens] = part
            if bias is not None:
                bias[tokens] = out[0].sum(0, dtype=self.dtype)
        return hidden, weight, bias

    def _tiles(self, operands: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Chunks of the vocabulary: tokens, the products (K, M, C) of the K operands, and room for what they become."""
        count, rows = len(operands), len(self.labels)
        if count == 2 and operands[0][1].data_ptr() == operands[1][1].data_ptr():
            # One product with twice the rows runs faster than two.
            operands = [(torch.cat([left for left, _ in operands]), self.weight)]
        room = self.hidden.new_empty(count * rows * self.chunk_size, dtype=self.dtype)
        out = room if self.factor_dtype == self.dtype else torch.empty_like(room, dtype=self.factor_dtype)
        for start in range(0, len(self.weight), self.chunk_size):
            tokens = slice(start, min(start + self.chunk_size, len(self.weight)))
            shape = (count, rows, tokens.stop - start)
            tile = room[: math.prod(shape)].view(shape)
            for product, (left, matrix) in zip(tile.view(len(operands), -1, shape[2]), operands, strict=True):
                _multiply(product, left, matrix[tokens].T)
            yield tokens, tile, tile if out is room else out[: math.prod(shape)].view(shape)

    def _chunk(
        self, tokens: slice, scale: Tensor | None = None, offset: Tensor | None = None, along: Tensor | None = None
    ) -> Chunk:
        return Chunk(
            self.labels - tokens.start,
            self.gain,
            self.ceiling,
            None if self.bias is None else self.bias[tokens],
            None if self.space is None else self.space.inverse_norm[tokens].to(self.dtype),
            None if along is None else along[tokens].to(self.dtype),
            scale,
            offset,
        )


def _multiply(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """Put left @ right into `out`, or add it, summed in the dtype of `out` whatever that of the factors.

    Within autocast a CPU too takes bfloat16 weights as they are, and rounds what they are multiplied with.
    """
    options: dict[str, Any] = {"out": out} if left.dtype == out.dtype else {"out": out, "out_dtype": out.dtype}
    narrow = out.device.type == "cpu" and right.dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu")
    right = right.to(left.dtype)
    factors: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009
    before = factors.fp32_precision
    if narrow:
        factors.fp32_precision = "bf16"
    try:
        if add:
            torch.addmm(out, left, right, **options)
        else:
            torch.mm(left, right, **options)
    finally:
        if narrow:
            factors.fp32_precision = before


class _OnePass(Function):
    """Value and derivative together, for a head that is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        space: CostSpace | None,
        chunk_size: int | None,
        derivative: bool,
    ) -> tuple[Tensor, Tensor | None]:
        scan = _Scan(hidden, head, labels, space, chunk_size)
        running, total = scan.fold(entropy=False, derivative=derivative)
        z, slope = scan.own()
        affinity = None if space is None else running.moment / running.mass
        if total is not None:
            total.mul_(head.scale)
            if affinity is not None:
                torch.addcmul(-total[1], affinity[:, None], total[0], out=total[1])
            torch.sub(slope, total[0], out=total[0])
            ctx.save_for_backward(total)
        ctx.dtype = hidden.dtype
        return z - running.peak - running.mass.log(), None if affinity is None else 1 - affinity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, log_odds: Tensor, cost: Tensor | None) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        hidden = log_odds[:, None] * derivative[0]
        if cost is not None:
            hidden.addcmul_(cost[:, None], derivative[1])
        return hidden.to(ctx.dtype), None, None, None, None, None


class _Divergence(Function):
    """Value and derivative together, for a head that is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        before: Tensor,
        head_before: Head,
        chunk_size: int | None,
        derivative: bool,
    ) -> Tensor:
        # No token is a label: all of them are others.
        nowhere = torch.full((len(hidden),), -1, device=hidden.device)
        scan, scan_before = (
            _Scan(states, of, nowhere, None, chunk_size, parts=2)
            for states, of in ((hidden, head), (before, head_before))
        )
        (now, earlier), total = scan.diverge(scan_before, derivative)
        if total is not None:
            ctx.save_for_backward(torch.sub(total[0], total[1]).mul_(head.scale))
        ctx.dtype = hidden.dtype
        gap = (now.peak - earlier.peak) + (now.mass / earlier.mass).log()
        # Rounding must not make it negative.
        return (earlier.moment / earlier.mass + gap).clamp_(min=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kl: Tensor) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        return (kl[:, None] * derivative).to(ctx.dtype), None, None, None, None, None


class _TwoPasses(Function):
    """The mean embedding, or a head that is trained: backward scans the vocabulary again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        space: CostSpace | None,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        scan = _Scan(hidden, head, labels, space, chunk_size)
        mean = None
        if space is None:
            running, _ = scan.fold(entropy=False, derivative=False)
        else:
            running, mean = scan.embed(space)
        z, _ = scan.own()
        ctx.save_for_backward(hidden, weight, bias, mean, *running)
        ctx.rest = (head, labels, space, chunk_size)
        return z - running.peak - running.mass.log(), mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, log_odds: Tensor, pull: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, mean, *running = ctx.saved_tensors
        head, labels, space, chunk_size = ctx.rest
        base = log_odds if pull is None else log_odds + (pull * mean).sum(1)
        scan = _Scan(hidden, replace(head, weight=weight, bias=bias), labels, space, chunk_size)
        _, for_weight, for_bias, *_ = ctx.needs_input_grad
        grads = scan.unfold(Running(*running), log_odds, base, pull, for_weight, for_bias)
        likes = (hidden, weight, bias)
        return *(None if g is None else g.to(like.dtype) for g, like in zip(grads, likes, strict=True)), *(None,) * 4
