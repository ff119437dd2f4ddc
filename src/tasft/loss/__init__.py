"""Penalties on tokens to avoid: pure functions of hidden states, an output head and labels.

Every penalty is minimised and called in one way, with the keyword arguments that it needs:

    PENALTIES[name].fn(hidden, head, labels, **needs) -> TokenSum
"""

from collections.abc import Callable
from typing import NamedTuple

from tasft.loss.likelihood import (
    ascent,
    log_probability,
    nlcl,
    nll,
    npo,
    npo_mean,
    simnpo,
    unlikelihood,
)
from tasft.loss.retain import divergence
from tasft.loss.space import CostSpace
from tasft.loss.tokens import IGNORE_INDEX, Head, TokenSum, mark, shift, unmark
from tasft.loss.transport import emd, emd_exact, emd_hinge, margins
from tasft.loss.watch import AvoidStatistics, avoid_statistics


class Penalty(NamedTuple):
    """A penalty and what the trainer must know of it.

    Attributes:
        fn: Takes hidden, head, labels and the keywords in `needs`; returns a `TokenSum`.
        needs: Subset of space (a `CostSpace`), margins and reference (`margins` and `log_probability`
            of the reference model), segments (response of each position), beta.
        per: What its count counts: "token" or "response".
        beta: Its usual value, where it needs one.
    """

    fn: Callable[..., TokenSum]
    needs: frozenset[str]
    per: str
    beta: float | None = None


PENALTIES: dict[str, Penalty] = {
    "emd": Penalty(emd, frozenset({"space"}), "token"),
    "emd_exact": Penalty(emd_exact, frozenset({"space"}), "token"),
    "emd_hinge": Penalty(emd_hinge, frozenset({"space", "margins"}), "token"),
    "nlcl": Penalty(nlcl, frozenset({"segments"}), "response"),
    "unlikelihood": Penalty(unlikelihood, frozenset(), "token"),
    "npo": Penalty(npo, frozenset({"segments", "reference", "beta"}), "response", 0.1),
    "npo_mean": Penalty(npo_mean, frozenset({"segments", "reference", "beta"}), "response", 1.0),
    "simnpo": Penalty(simnpo, frozenset({"segments", "beta"}), "response", 1.0),
    "ascent": Penalty(ascent, frozenset(), "token"),
}

__all__ = [
    "IGNORE_INDEX",
    "PENALTIES",
    "AvoidStatistics",
    "CostSpace",
    "Head",
    "Penalty",
    "TokenSum",
    "ascent",
    "avoid_statistics",
    "divergence",
    "emd",
    "emd_exact",
    "emd_hinge",
    "log_probability",
    "margins",
    "mark",
    "nlcl",
    "nll",
    "npo",
    "npo_mean",
    "shift",
    "simnpo",
    "unlikelihood",
    "unmark",
]
