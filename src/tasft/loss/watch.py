"""What to look at while a model is trained; without derivative.

Shapes: N positions, M of them counted, V tokens, D width.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tasft.loss.scan import statistics
from tasft.loss.space import CostSpace
from tasft.loss.tokens import Head, TokenSum, counted, total_of


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
    per_position = statistics(hidden, head, labels, space, chunk_size)
    return AvoidStatistics(*(total_of(values, None) for values in per_position))
