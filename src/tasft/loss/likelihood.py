"""Penalties that make what was said less probable.

Shapes: N positions, M of them counted, S responses, V tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tasft.loss.scan import other_tokens
from tasft.loss.tokens import IGNORE_INDEX, Head, TokenSum, at_counted, counted, total_of

_LOG_EPS = {dtype: math.log(torch.finfo(dtype).eps) for dtype in (torch.float32, torch.float64)}


def log_probability(
    hidden: Float[Tensor, "N D"], head: Head, labels: Int[Tensor, " N"], *, chunk_size: int | None = None
) -> Float[Tensor, " N"]:
    """How probable each token was: log Q_t(y_t), in nats, in (-inf, 0].

    Args:
        hidden: Final hidden states.
        head: Maps them to logits.
        labels: The token at each position (shifted); `IGNORE_INDEX` does not count.
        chunk_size: Tokens of the vocabulary taken at a time; changes memory and speed, not the result.

    Returns:
        One value for each position, 0 where it is ignored; precise also where Q rounds to 1.

    Raises:
        ValueError: Shapes disagree, or a label is not a token.
    """
    keep = labels != IGNORE_INDEX
    log_q = F.logsigmoid(_log_odds(hidden, head, labels, chunk_size))
    return torch.zeros_like(keep, dtype=log_q.dtype).masked_scatter(keep, log_q)


def nll(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
) -> TokenSum:
    """Imitate: the negative log-likelihood of what was said, the loss of plain SFT.

        -log Q_t(y_t),  in nats, in [0, inf)

    Args:
        hidden: Final hidden states.
        head: Maps them to logits.
        labels: The token at each position (shifted); `IGNORE_INDEX` does not count.
        weights: How much each counted position counts, above 0; None is 1.
        chunk_size: Tokens of the vocabulary taken at a time; changes memory and speed, not the result.

    Returns:
        Sum over counted positions and their number (the sum of their weights).

    Raises:
        ValueError: Shapes disagree, or a label is not a token.

    Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), Eq. 1 before the division.
    """
    log_odds = _log_odds(hidden, head, labels, chunk_size)
    return total_of(-F.logsigmoid(log_odds), at_counted(weights, labels))


def nlcl(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    segments: Int[Tensor, " N"],
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
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
        weights: How much each response counts, above 0, given at all of its positions; None is 1.
        chunk_size: Tokens of the vocabulary taken at a time; changes memory and speed, not the result.

    Returns:
        Sum over the responses that have a counted position, and their number (the sum of their weights).

    Raises:
        ValueError: Shapes disagree, or a label is not a token.

    Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), Eq. 7; length-normalised P from
    Hong, Lee, Thorne 2024 (arXiv 2403.07691).
    """
    log_odds = _log_odds(hidden, head, labels, chunk_size)
    index, length, weights = _responses(segments, labels, weights)

    # The loss is a function of m = mean_t -log Q_t. Near P = 1 m underflows, and with it
    # 1 - P = -expm1(-m); hence log m, as a mean taken in logs.
    log_surprise = _log_softplus(-log_odds)
    peak = log_surprise.new_full(length.shape, -torch.inf)
    peak = peak.scatter_reduce(0, index, log_surprise.detach(), "amax")
    total = torch.zeros_like(peak).index_add(0, index, (log_surprise - peak[index]).exp())
    log_m = peak + (total / length).log()
    return total_of(-_log_complement(log_m), weights)


def unlikelihood(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
) -> TokenSum:
    """Make each token improbable.

        -log(1 - Q_t(y_t)),  in nats, in [0, inf)

    Arguments, result and errors as in `nll`.

    Source: Welleck, Kulikov, Roller, Dinan, Cho, Weston 2019 (arXiv 1908.04319), Eq. 4, with the
    token that was said as the only negative candidate.
    """
    log_odds = _log_odds(hidden, head, labels, chunk_size)
    return total_of(-F.logsigmoid(-log_odds), at_counted(weights, labels))


def npo(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    segments: Int[Tensor, " N"],
    reference: Float[Tensor, " N"],
    beta: float = 0.1,
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
) -> TokenSum:
    """Make each response less probable than the reference model finds it (negative preference optimisation).

        2/beta log(1 + (pi/pi_ref)^beta),  pi = prod_t Q_t(y_t) over a response, in nats, in (0, inf)

    Its gradient is that of `ascent` times 2 (pi/pi_ref)^beta / (1 + (pi/pi_ref)^beta): it fades as the response
    leaves the reference behind.

    Args:
        hidden: As in `nlcl`, as are the result and the errors.
        head: As in `nlcl`.
        labels: As in `nlcl`.
        segments: As in `nlcl`.
        reference: log Q_t(y_t) of the model at step 0, from `log_probability`; ignored positions are not read.
        beta: How soon it fades, above 0; towards 0 it becomes `ascent`.
        weights: As in `nlcl`.
        chunk_size: As in `nlcl`.

    Source: Zhang, Lin, Bai, Mei 2024 (arXiv 2404.05868), Eq. 3.
    """
    log_q = F.logsigmoid(_log_odds(hidden, head, labels, chunk_size))
    index, length, weights = _responses(segments, labels, weights)
    ratio = _summed(log_q - reference[labels != IGNORE_INDEX], index, length)
    return total_of(_released(ratio, beta), weights)


def npo_mean(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    segments: Int[Tensor, " N"],
    reference: Float[Tensor, " N"],
    beta: float = 1.0,
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
) -> TokenSum:
    """As `npo`, of the mean over a response: how soon it fades does not depend on the length.

        2/beta log(1 + (P/P_ref)^beta),  P = exp(mean_t log Q_t(y_t)) over a response, in nats, in (0, inf)

    Arguments, result and errors as in `npo`.

    Source: Zhang, Yang, Ke, Cui, Zheng, Wang, Huang 2024 (arXiv 2407.02855), Safe Unlearning, as its code has it; the
    factor 2/beta is that of `npo`, where theirs is 1.
    """
    log_q = F.logsigmoid(_log_odds(hidden, head, labels, chunk_size))
    index, length, weights = _responses(segments, labels, weights)
    ratio = _summed(log_q - reference[labels != IGNORE_INDEX], index, length) / length
    return total_of(_released(ratio, beta), weights)


def simnpo(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    segments: Int[Tensor, " N"],
    beta: float = 1.0,
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
) -> TokenSum:
    """As `npo_mean`, without a reference model: a response that is improbable already is left alone.

        2/beta log(1 + P^beta),  P = exp(mean_t log Q_t(y_t)) over a response, in nats, in (0, 2/beta log 2]

    Arguments, result and errors as in `npo`.

    Source: Fan, Liu, Lin, Jia, Zhang, Mei, Liu 2024 (arXiv 2410.07163), SimNPO, with a margin of 0.
    """
    log_q = F.logsigmoid(_log_odds(hidden, head, labels, chunk_size))
    index, length, weights = _responses(segments, labels, weights)
    return total_of(_released(_summed(log_q, index, length) / length, beta), weights)


def ascent(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
) -> TokenSum:
    """Climb the loss of plain SFT: the control that collapses.

        log Q_t(y_t),  in nats, in (-inf, 0]

    It is `nll` turned round: without a bound below, it never fades. Arguments, result and errors as in `nll`.
    """
    total, count = nll(hidden, head, labels, weights=weights, chunk_size=chunk_size)
    return TokenSum(-total, count)


def _log_odds(
    hidden: Float[Tensor, "N D"], head: Head, labels: Int[Tensor, " N"], chunk_size: int | None
) -> Float[Tensor, " M"]:
    """Log-odds of the label, log Q(y) - log(1 - Q(y)): precise at both ends, unlike Q."""
    hidden, labels = counted(hidden, head, labels)
    return other_tokens(hidden, head, labels, chunk_size=chunk_size).log_odds


def _responses(
    segments: Int[Tensor, " N"], labels: Int[Tensor, " N"], weights: Float[Tensor, " N"] | None
) -> tuple[Int[Tensor, " M"], Int[Tensor, " S"], Float[Tensor, " S"] | None]:
    """Of each counted position its response, from 0; of each response its counted positions, and its weight."""
    keep = labels != IGNORE_INDEX
    _, index, length = torch.unique(segments[keep], return_inverse=True, return_counts=True)
    if weights is not None:
        weights = weights.new_empty(length.shape).scatter(0, index, weights[keep])
    return index, length, weights


def _summed(values: Float[Tensor, " M"], index: Int[Tensor, " M"], length: Int[Tensor, " S"]) -> Float[Tensor, " S"]:
    return values.new_zeros(length.shape).index_add(0, index, values)


def _released(log_ratio: Float[Tensor, " S"], beta: float) -> Float[Tensor, " S"]:
    """The bowl of NPO, 2/beta log(1 + ratio^beta): it lets go of what has become improbable."""
    return -2 / beta * F.logsigmoid(-beta * log_ratio)


def _log_softplus(x: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Logarithm of softplus, log log(1 + exp(x)): x where exp(x)/2, its next term, is lost."""
    lost = x < _LOG_EPS[x.dtype]
    # `where` differentiates both branches: each must stay finite where the other is taken.
    safe = x.masked_fill(lost, 0.0)
    return torch.where(lost, x, (-F.logsigmoid(-safe)).log())


def _log_complement(log_m: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Log(1 - P) of P = exp(-m): log m where m/2, its next term, is lost; else by the form that is precise at m."""
    lost = log_m < _LOG_EPS[log_m.dtype]
    m = log_m.masked_fill(lost, 0.0).exp()
    large = m.clamp(min=math.log(2))
    precise = torch.where(m < large, (-torch.expm1(-m)).log(), torch.log1p(-torch.exp(-large)))
    return torch.where(lost, log_m, precise)
