"""What to look at while a model is trained; without derivative.

Shapes: N positions, M of them counted, V tokens, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tasft.loss import tiles
from tasft.loss.scan import statistics
from tasft.loss.space import CostSpace
from tasft.loss.tokens import Head, TokenSum, counted, total_of

_ROWS = 64  # Whose logits are held at a time.


class AvoidStatistics(NamedTuple):
    """What to watch on avoid tokens, whichever penalty is trained."""

    emd: TokenSum
    entropy: TokenSum
    top1: TokenSum


@torch.no_grad()
def avoid_statistics(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    space: CostSpace,
    chunk_size: int | None = None,
) -> AvoidStatistics:
    """How far the model has moved from the tokens to avoid, and whether it still hesitates.

    Distance that grows while entropy falls to 0 is the collapse that a bounded penalty allows.
    No gradient; one more product with the head. Arguments and errors as in `emd`.

    Returns:
        Sums over counted positions of EMD_t (unitless, in [0, 2]), of the entropy of Q_t
        (nats, in [0, log V]) and of its largest probability.
    """
    hidden, labels = counted(hidden, head, labels)
    each = statistics(hidden, head, labels, space, chunk_size)
    return AvoidStatistics(*(total_of(values, None) for values in each))


@torch.no_grad()
def divergence(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, " N"],
    *,
    before: Float[Tensor, "M D"],
    head_before: Head,
) -> TokenSum:
    """How far the prediction has moved since an earlier model.

        KL_t = sum_w Q0_t(w) (log Q0_t(w) - log Q_t(w)),  in nats, in [0, inf)

    Holds a few buffers of 64 x V numbers.

    Args:
        hidden: Final hidden states.
        head: Maps them to logits.
        labels: As in `emd`; only whether a position counts matters.
        before: Final hidden states of the earlier model at the counted positions.
        head_before: Its head.

    Returns:
        Sum over counted positions and their number.
    """
    now, _ = counted(hidden, head, labels)
    parts = zip(torch.split(now, _ROWS), torch.split(before, _ROWS), strict=True)
    terms = [
        F.kl_div(_log_q(rows, head), _log_q(earlier, head_before), reduction="none", log_target=True).sum(1)
        for rows, earlier in parts
    ]
    return total_of(torch.cat([now.new_zeros(0, dtype=torch.float32), *terms]), None)


def _log_q(hidden: Float[Tensor, "M D"], head: Head) -> Float[Tensor, "M V"]:
    product = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    z = product.to(torch.promote_types(product.dtype, torch.float32))
    tiles.logits(z, None, head.gain, head.ceiling)
    return z.log_softmax(1)
