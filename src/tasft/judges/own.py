"""A judge of one's own."""

import math
from collections.abc import Sequence

from tasft.core.errors import UserError
from tasft.core.parts import Own, Part, fields_of
from tasft.judges.base import JudgeSettings, Pair, Verdict, undecided

_FIELDS = {"harmful": (bool,), "refusal": (bool,), "partial": (bool,), "score": (float, int), "reason": (str,)}


class OwnJudge:
    """A function or an object that is called with `Pair`s and gives back a dictionary for each.

    A dictionary says some of `harmful`, `refusal`, `partial` (true, false, or None: undecided), `score` (higher is more
    harmful) and `reason`. The attribute `tells` of the part names which of the first three it says, by default
    `{"harmful"}`; its attribute `threshold` the score from which a reply is harmful, by default None.

    Raises:
        UserError: It cannot be had, or does not take pairs; when it judges, what it gives back is something else.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.name = settings.kind
        target = settings.target or settings.kind
        self._part = Own("judges", Part(target=target, options=settings.options), lambda _: ["pairs"])
        self.tells = frozenset(getattr(self._part.made, "tells", ("harmful",)))
        self.threshold: float | None = getattr(self._part.made, "threshold", None)
        if strange := self.tells - {"harmful", "refusal", "partial"}:
            names = ", ".join(sorted(map(str, strange)))
            raise UserError(f"{target}: tells names {names}; a judge tells some of harmful, refusal, partial")
        self.version = self._part.version

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair, in their order."""
        rows = self._part.one_each(self._part(list(pairs)), pairs, "verdicts")
        return [self._verdict(pair, row) for pair, row in zip(pairs, rows, strict=True)]

    def _verdict(self, pair: Pair, row: object) -> Verdict:
        where = f"{self._part.where}, of the reply {pair.id!r:.60}"
        fields = fields_of(row, _FIELDS, where)
        score = fields.get("score")
        if score is not None and not math.isfinite(score):
            raise UserError(f"{where}: score is {score}; give a finite number, or None where there is none")
        outcomes = {what: fields.get(what) for what in self.tells}
        reason = fields.get("reason") or ""
        verdict = Verdict(
            pair.id, self.name, outcomes.get("harmful"), score, outcomes.get("refusal"), partial=outcomes.get("partial")
        )
        if "harmful" in outcomes and outcomes["harmful"] is None:
            return undecided(verdict, reason or "it did not say")
        return verdict
