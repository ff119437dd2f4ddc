"""Penalties that make what was said less probable.

Shapes: N positions, M of them counted, S responses, V tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tasft.loss.tokens import CHUNK_ROWS, IGNORE_INDEX, Head, TokenSum, counted, map_rows

_LOG_EPS = {dtype: math.log(torch.finfo(dtype).eps) for dtype in (torch.float32, torch.float64)}


def log_probability(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> Float[Tensor, " M"]:
    """How probable each counted token was: log Q_t(y_t), in nats, in (-inf, 0].

    Holds a few buffers of chunk_rows x V numbers, in forward and in backward, never M x V.

    Args:
        hidden: Final hidden states.
        head: Maps them to logits.
        labels: The token at each position (shifted); `IGNORE_INDEX` does not count.
        chunk_rows: Positions scored at a time; changes memory, not the result.

    Returns:
        One value for each counted position, in order; precise also where Q rounds to 1.

    Raises:
        ValueError: Shapes disagree, or a label is not a token.
    """
    hidden, labels = counted(hidden, head, labels)
    return F.logsigmoid(_log_odds(hidden, head, labels, chunk_rows))


def nlcl(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    segments: Int[Tensor, " N"],
    chunk_rows: int = CHUNK_ROWS,
) -> TokenSum:
    """Make each response improbable as a whole (negative log complement likelihood).

        -log(1 - P),  P = exp(mean_t log Q_t(y_t)) over a response, in nats, in [0, inf)

    It is ORPO's odds ratio with the odds of the preferred answer set to 1. Its gradient fades
    with P: an improbable response is left alone.

    Args:
        hidden: Final hidden states.
        head: Maps them to logits.
        labels: The token at each position (shifted); `IGNORE_INDEX` does not count.
        segments: Which response a position belongs to; any integers.
        chunk_rows: Positions scored at a time; changes memory, not the result.

    Returns:
        Sum over the responses that have a counted position, and their number.

    Raises:
        ValueError: Shapes disagree, or a label is not a token.

    Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), Eq. 7; length-normalised P from
    Hong, Lee, Thorne 2024 (arXiv 2403.07691).
    """
    keep = labels != IGNORE_INDEX
    hidden, labels = counted(hidden, head, labels)
    log_odds = _log_odds(hidden, head, labels, chunk_rows)
    responses, index, length = torch.unique(segments[keep], return_inverse=True, return_counts=True)

    # The loss is a function of m = mean_t -log Q_t. Near P = 1 m underflows, and with it
    # 1 - P = -expm1(-m); hence log m, as a mean taken in logs.
    log_surprise = _log_softplus(-log_odds)
    peak = log_surprise.new_full(responses.shape, -torch.inf)
    peak = peak.scatter_reduce(0, index, log_surprise.detach(), "amax")
    total = torch.zeros_like(peak).index_add(0, index, (log_surprise - peak[index]).exp())
    log_m = peak + (total / length).log()
    return TokenSum(-_log_complement(log_m).sum(), index.new_tensor(responses.numel()))


def _log_odds(
    hidden: Float[Tensor, "M D"], head: Head, labels: Int[Tensor, " M"], chunk_rows: int
) -> Float[Tensor, " M"]:
    """Log-odds of the label, log Q(y) - log(1 - Q(y)): precise at both ends, unlike Q."""

    def chunk(rows: Tensor, tokens: Tensor) -> tuple[Tensor]:
        others, own = head.logits_of_others(rows, tokens)
        return (own - others.logsumexp(1),)

    (log_odds,) = map_rows(chunk, hidden, labels, chunk_rows=chunk_rows)
    return log_odds


def _log_softplus(x: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Logarithm of softplus, log log(1 + exp(x)): x where exp(x)/2, its next term, is lost."""
    lost = x < _LOG_EPS[x.dtype]
    # `where` differentiates both branches: each must stay finite where the other is taken.
    safe = x.masked_fill(lost, 0.0)
    return torch.where(lost, x, (-F.logsigmoid(-safe)).log())


def _log_complement(log_m: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Log(1 - P) of P = exp(-m): log m where m/2, its next term, is lost."""
    lost = log_m < _LOG_EPS[log_m.dtype]
    safe = log_m.masked_fill(lost, 0.0)
    return torch.where(lost, log_m, (-torch.expm1(-safe.exp())).log())


def nll(hidden: Float[Tensor, "N D"], head: Head, labels: Int[Tensor, " N"]) -> TokenSum:
    """Imitate: the negative log-likelihood of what was said, the loss of plain SFT.

        -log Q_t(y_t),  in nats, in [0, inf)

    torch's `linear_cross_entropy` in chunks, which never holds N x V numbers. A soft-capped head has
    no such form and takes `log_probability`. Below float32 the sum, not its gradient, is rounded to
    the dtype of the head.

    Returns:
        Sum over counted positions and their number.

    Raises:
        ValueError: Shapes disagree, or a label is not a token.

    Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), Eq. 1 before the division.
    """
    if head.softcap is not None:
        log_q = log_probability(hidden, head, labels)
        return TokenSum(-log_q.sum(), labels.new_tensor(log_q.numel()))
    hidden, labels = counted(hidden, head, labels)
    # torch's own choice of chunk is made for GPUs: on a CPU it takes ten times as long.
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS)
    total = F.linear_cross_entropy(
        hidden.to(head.weight.dtype) * head.scale,
        head.weight,
        labels,
        linear_bias=None if head.bias is None else head.bias * head.scale,
        reduction="sum",
        options=options,
    )
    dtype = torch.promote_types(total.dtype, torch.float32)
    return TokenSum(total.to(dtype), labels.new_tensor(labels.numel()))
