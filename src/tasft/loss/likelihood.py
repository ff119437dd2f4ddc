"""Penalties that make what was said less probable.

Shapes: N positions, M of them counted, S responses, V tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tasft.loss.scan import other_tokens
from tasft.loss.tokens import IGNORE_INDEX, Head, TokenSum, counted

_LOG_EPS = {dtype: math.log(torch.finfo(dtype).eps) for dtype in (torch.float32, torch.float64)}
_NLL_ROWS = 256  # Of torch's linear cross-entropy at a time; its own choice, made for GPUs, takes ten times as long.


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


def nlcl(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    segments: Int[Tensor, " N"],
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
        chunk_size: Tokens of the vocabulary taken at a time; changes memory and speed, not the result.

    Returns:
        Sum over the responses that have a counted position, and their number.

    Raises:
        ValueError: Shapes disagree, or a label is not a token.

    Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), Eq. 7; length-normalised P from
    Hong, Lee, Thorne 2024 (arXiv 2403.07691).
    """
    log_odds = _log_odds(hidden, head, labels, chunk_size)
    index, length = _responses(segments, labels)

    # The loss is a function of m = mean_t -log Q_t. Near P = 1 m underflows, and with it
    # 1 - P = -expm1(-m); hence log m, as a mean taken in logs.
    log_surprise = _log_softplus(-log_odds)
    peak = log_surprise.new_full(length.shape, -torch.inf)
    peak = peak.scatter_reduce(0, index, log_surprise.detach(), "amax")
    total = torch.zeros_like(peak).index_add(0, index, (log_surprise - peak[index]).exp())
    log_m = peak + (total / length).log()
    return TokenSum(-_log_complement(log_m).sum(), index.new_tensor(length.numel()))


def unlikelihood(
    hidden: Float[Tensor, "N D"], head: Head, labels: Int[Tensor, " N"], *, chunk_size: int | None = None
) -> TokenSum:
    """Make each token improbable.

        -log(1 - Q_t(y_t)),  in nats, in [0, inf)

    Arguments and errors as in `log_probability`.

    Returns:
        Sum over counted positions and their number.

    Source: Welleck, Kulikov, Roller, Dinan, Cho, Weston 2019 (arXiv 1908.04319), Eq. 4, with the
    token that was said as the only negative candidate.
    """
    log_odds = _log_odds(hidden, head, labels, chunk_size)
    return TokenSum(-F.logsigmoid(-log_odds).sum(), labels.new_tensor(log_odds.numel()))


def npo(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    segments: Int[Tensor, " N"],
    reference: Float[Tensor, " N"],
    beta: float = 0.1,
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
        chunk_size: As in `nlcl`.

    Source: Zhang, Lin, Bai, Mei 2024 (arXiv 2404.05868), Eq. 3.
    """
    log_q = F.logsigmoid(_log_odds(hidden, head, labels, chunk_size))
    index, length = _responses(segments, labels)
    ratio = log_q.new_zeros(length.shape).index_add(0, index, log_q - reference[labels != IGNORE_INDEX])
    return TokenSum(-2 / beta * F.logsigmoid(-beta * ratio).sum(), index.new_tensor(length.numel()))


def ascent(
    hidden: Float[Tensor, "N D"], head: Head, labels: Int[Tensor, " N"], *, chunk_size: int | None = None
) -> TokenSum:
    """Climb the loss of plain SFT: the control that collapses.

        log Q_t(y_t),  in nats, in (-inf, 0]

    It has no bound below and never fades. Arguments and errors as in `log_probability`.

    Returns:
        Sum over counted positions and their number.
    """
    log_odds = _log_odds(hidden, head, labels, chunk_size)
    return TokenSum(F.logsigmoid(log_odds).sum(), labels.new_tensor(log_odds.numel()))


def _log_odds(
    hidden: Float[Tensor, "N D"], head: Head, labels: Int[Tensor, " N"], chunk_size: int | None
) -> Float[Tensor, " M"]:
    """Log-odds of the label, log Q(y) - log(1 - Q(y)): precise at both ends, unlike Q."""
    hidden, labels = counted(hidden, head, labels)
    return other_tokens(hidden, head, labels, chunk_size=chunk_size).log_odds


def _responses(segments: Int[Tensor, " N"], labels: Int[Tensor, " N"]) -> tuple[Int[Tensor, " M"], Int[Tensor, " S"]]:
    """For each counted position its response, numbered from 0; and for each response its counted positions."""
    _, index, length = torch.unique(segments[labels != IGNORE_INDEX], return_inverse=True, return_counts=True)
    return index, length


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
        total, count = ascent(hidden, head, labels)
        return TokenSum(-total, count)
    hidden, labels = counted(hidden, head, labels)
    total = F.linear_cross_entropy(
        hidden.to(head.weight.dtype) * head.gain,
        head.weight,
        labels,
        linear_bias=None if head.bias is None else head.bias * head.gain,
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_NLL_ROWS),
    )
    dtype = torch.promote_types(total.dtype, torch.float32)
    return TokenSum(total.to(dtype), labels.new_tensor(labels.numel()))
