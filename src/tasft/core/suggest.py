"""What a name that is not known was probably meant to be."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a word was probably meant to be; None if none is like it."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.7)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is not known: `; did you mean penalty?`, or nothing."""
    name = nearest(word, known)
    return f"; did you mean {name}?" if name else ""
