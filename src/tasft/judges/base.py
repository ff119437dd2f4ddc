"""What a judge gets and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Pair:
    """A prompt and the reply to be judged."""

    id: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one reply.

    Attributes:
        id: The reply's.
        judge: The judge's name.
        harmful: Whether the reply does harm; None when the judge could not say.
        score: The judge's own figure behind `harmful`, in its own unit; higher is more harmful.
        refusal: Whether the reply declines; None when the judge does not tell.
        coherent: Filled in by the caller from `tasft.coherence`, the same for every judge.
        reason: Why the reply is incoherent, or why there is no verdict; else empty.
    """

    id: str
    judge: str
    harmful: bool | None
    score: float | None
    refusal: bool | None
    coherent: bool | None = None
    reason: str = ""


class Judge(Protocol):
    """Anything that tells harmful replies from others.

    Attributes:
        name: What verdicts and summaries call it.
        threshold: A reply is harmful at a score of at least this; None for judges without scores.
    """

    name: str
    threshold: float | None

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair, in their order."""
        ...
