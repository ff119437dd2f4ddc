"""What a judge gets and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from tasft.core.errors import UserError
from tasft.models.server_settings import Server

UNREADABLE = "unreadable: "
SHOWN_CHARACTERS = 200


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
        harmful: Whether the reply does harm; None when the judge is undecided, could not be read, or never says.
            Text that is incoherent by itself is sent to no judge: it neither harms nor declines.
        score: The judge's own figure behind `harmful`, in its own unit; higher is more harmful. None where it has
            none, or could not read the reply.
        refusal: Whether the reply declines, wholly or partly; None when the judge does not tell.
        coherent: Filled in by the caller: neither `tasft.judges.coherence` nor `broken` speaks against it.
        reason: Why the reply is incoherent, what of the judge's answer could not be read, or why it is undecided; else
            empty.
        key: Filled in by the caller: content hashes of the judge's version, and of the prompt and the reply.
        partial: Whether the reply declines a part and serves the rest; None when the judge does not tell.
        undecided: Whether the judge read the reply and says neither that it harms nor that it does not; None of a judge
            that is never undecided.
        on_topic: Filled in by the caller, as `coherent`: whether the reply is about what was asked; None where its
            topic was not looked at.
        broken: Whether the judge reads it as no text: corrupted words, a fragment, a loop; None where it does not say.
    """

    id: str
    judge: str
    harmful: bool | None
    score: float | None
    refusal: bool | None
    coherent: bool | None = None
    reason: str = ""
    key: str = ""
    partial: bool | None = None
    on_topic: bool | None = None
    undecided: bool | None = None
    broken: bool | None = None

    @property
    def unreadable(self) -> bool:
        """Whether the judge was asked and its answer could not be read: no verdict, which is not a safe one."""
        return self.reason.startswith(UNREADABLE)

    @property
    def has_cause(self) -> bool:
        """Whether `reason` is why the reply is incoherent, and not of the judge."""
        return not self.unreadable and not self.undecided


def unreadable(pair: Pair, judge: str, answer: str) -> Verdict:
    """The verdict of a judge whose answer has none of its documented forms; shows the answer's beginning."""
    return Verdict(pair.id, judge, None, None, None, reason=UNREADABLE + repr(answer[:SHOWN_CHARACTERS]))


def undecided(verdict: Verdict, reason: str) -> Verdict:
    """The verdict without a word on harm, and why; what it says of refusal stays."""
    return replace(verdict, harmful=None, undecided=True, reason=f"undecided: {reason}")


class Judge(Protocol):
    """Anything that tells harmful replies from others.

    Attributes:
        name: What verdicts and summaries call it.
        version: Content hash of all that its verdicts depend on besides the pair: weights or name of the model,
            prompt, threshold.
        tells: Which of `harmful`, `refusal` and `partial` its verdicts say; a judge of scores alone says none.
        threshold: A reply is harmful at a score of at least this; None where it is not the score that decides.
    """

    name: str
    version: str
    tells: frozenset[str]
    threshold: float | None

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair, in their order.

        An answer of a model that cannot be read gives the verdict of `unreadable`.
        """
        ...


class JudgeSettings(BaseModel):
    """Which judge, and where its model is."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: str = Field(description="A name in `tasft.judges.JUDGES`.")
    model: str | None = Field(None, description="A hub name or folder; null takes the judge's usual model.")
    server: Server | None = Field(None, description="A server that runs the model; null runs it in this process.")
    rubric: str | None = Field(
        None,
        description="harmful (also null), strongreject, pair, xstest, or a text file with {prompt} and {reply}.",
    )
    of: list[str] = Field([], description="panel: the judges that are asked, by their names.")
    agree: Literal["any", "majority", "all"] = Field(
        "majority", description="panel: yes by any of them, by more than half, or by all."
    )
    calibration: str | None = Field(
        None, description="A file that tasft judge --calibrate wrote; null takes the judge's own thresholds."
    )
    batch_size: int = Field(16, ge=1, description="Pairs that a model in this process reads together.")
    target: str | None = Field(None, description="python: a class or function of your own, mypkg.judges:Mine.")
    options: dict[str, Any] = Field({}, description="python: what it is given by name.")

    @classmethod
    def of_name(cls, name: str, **fields: Any) -> "JudgeSettings":
        """The settings of a kind; of `python:mypkg.judges:Mine` those of a judge of one's own."""
        kind, _, target = name.partition(":")
        return cls.model_validate({"kind": kind, **({"target": target} if target else {}), **fields})

    def only(self, *names: str) -> "JudgeSettings":
        """Itself, if it sets none but these besides `kind`.

        Raises:
            UserError: It sets something that this kind of judge would not read.
        """
        # A recipe that is written down in full names the usual values too.
        usual = type(self)(kind=self.kind)
        set_here = {name for name in self.model_fields_set if getattr(self, name) != getattr(usual, name)}
        if others := sorted(set_here - {"kind", "calibration", *names}):
            known = f"; it reads {', '.join(names)}" if names else ""
            raise UserError(f"judge {self.kind}: it does not read {', '.join(others)}: leave that out{known}")
        return self
