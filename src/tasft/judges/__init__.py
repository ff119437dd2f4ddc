"""Judges: what says whether a reply harms or declines.

`JUDGES` maps a name to a factory without arguments. A new judge is one class and one line here.
"""

from collections.abc import Callable

from tasft.judges.base import Judge, Pair, Verdict
from tasft.judges.phrases import Phrases


def _embedded() -> Judge:
    # Recipes are checked against the names alone: torch is imported only when the judge is wanted.
    from tasft.judges.embedded import Embedded

    return Embedded()


JUDGES: dict[str, Callable[[], Judge]] = {"embedded": _embedded, "phrases": Phrases}

__all__ = ["JUDGES", "Judge", "Pair", "Verdict"]
