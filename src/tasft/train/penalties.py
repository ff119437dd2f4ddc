"""The penalty that a training is told: one of ours, or of one's own."""

from collections.abc import Callable
from typing import Any

from tasft.core.errors import UserError
from tasft.core.parts import Own, Part
from tasft.loss import PENALTIES, Penalty, TokenSum

NEEDS = frozenset({"space", "margins", "reference", "segments", "beta"})


def penalty_of(name: str, part: Part | dict[str, Any] | None = None) -> Penalty | None:
    """A penalty by its name; for `python` what `part` names; None for `none`.

    One's own is called as ours are, `fn(hidden, head, labels, weights=None, **needs) -> TokenSum`, see `tasft.loss`.
    Its attribute `needs` names the keywords that it wants, of those in `NEEDS`; its attribute `per` what its count
    counts, `token` or `response`.

    Raises:
        UserError: There is none of that name, or the part cannot be had or does not take what it is given; in
            training, it gives back something else than a `TokenSum`.
    """
    if name != "python":
        if name not in ("none", *PENALTIES):
            raise UserError(f"penalty is {name!r}; use none, python or one of {', '.join(PENALTIES)}")
        return PENALTIES.get(name)
    if part is None:
        raise UserError("penalty is python: say where it is, by own_penalty: {target: mypkg.losses:mine}")
    own = own_penalty(Part.model_validate(part))
    needs, per = frozenset(getattr(own.made, "needs", ())), getattr(own.made, "per", "token")
    if strange := needs - NEEDS:
        raise UserError(f"{own.where}: needs names {', '.join(sorted(strange))}; there is {', '.join(sorted(NEEDS))}")
    if per not in ("token", "response"):
        raise UserError(f"{own.where}: per is {per!r:.40}; say token or response")
    return Penalty(_summed(own), needs, per, 1.0 if "beta" in needs else None)


def own_penalty(part: Part) -> Own:
    """The part, which takes what a penalty is given."""
    return Own(
        "penalties", part, lambda made: ["hidden", "head", "labels", "*", "weights", *getattr(made, "needs", ())]
    )


def _summed(own: Own) -> Callable[..., TokenSum]:
    def call(*args: Any, **kwargs: Any) -> TokenSum:
        result = own(*args, **kwargs)
        if not isinstance(result, TokenSum):
            raise UserError(f"{own.where} gave back {type(result).__name__}; a penalty gives a tasft.loss.TokenSum")
        return result

    return call
