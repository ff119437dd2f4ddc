"""A judge's scores made probabilities, and its thresholds, by a user's own labels."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy.optimize import minimize
from scipy.special import expit

from tasft.core.errors import UserError
from tasft.core.provenance import content_hash
from tasft.judges.base import Judge, Pair, Verdict, undecided

FEWEST = 10
UNDECIDED_SHARE = 0.1
_SMALL = 1e-6

Floats = NDArray[np.float64]


class Fit(BaseModel):
    """What `tasft judge --calibrate` writes and `judges.NAME.calibration` names.

    Probability of harm = 1 / (1 + exp(-(slope * x + offset))); x is the score, or its log-odds (Platt 1999).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    judge: str = Field(description="Kind of the judge.")
    version: str = Field(description="Its version; another one's scores mean something else.")
    reads: Literal["score", "log-odds"]
    slope: float = Field(gt=0)
    offset: float
    low: float = Field(ge=0, le=1, description="From this probability of harm on the judge is undecided,")
    high: float = Field(ge=0, le=1, description="and from this one on it says harmful.")
    n: int = Field(description="Labelled pairs that it was fitted to.")
    harmful: int
    labels: str = Field(description="Content hash of prompts, replies and labels.")

    @model_validator(mode="after")
    def _in_order(self) -> "Fit":
        if self.low > self.high:
            raise ValueError("low is above high")
        return self

    def probabilities(self, scores: Sequence[float]) -> Floats:
        """Of harm, in [0, 1]."""
        return _sigmoid(self.slope * _x(scores, self.reads) + self.offset)


def read_fit(path: Path) -> Fit:
    """The file of a fit.

    Raises:
        UserError: It is missing, or is none.
    """
    try:
        return Fit.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); tasft judge --calibrate writes it") from None
    except (ValueError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(
            f"{path}: not a file of tasft judge --calibrate ({reason:.80}); have it written again"
        ) from None


def fit(judge: Judge, kind: str, pairs: Sequence[Pair], scores: Sequence[float | None], labels: Sequence[bool]) -> Fit:
    """Calibration and thresholds of a judge on labelled pairs; pairs without a score are left out.

    The threshold has the best F1; undecided is the tenth of all pairs that is nearest to it.

    Raises:
        UserError: The judge gives no scores, too few pairs have one, or its scores do not rise with harm.
    """
    known = [(score, label) for score, label in zip(scores, labels, strict=True) if score is not None]
    harmful = sum(label for _, label in known)
    if min(harmful, len(known) - harmful) < FEWEST:
        raise UserError(
            f"judge {judge.name}: {len(known)} labelled pairs have a score, {harmful} of them harmful; {FEWEST} "
            f"harmful and {FEWEST} harmless ones are the fewest to fit to"
        )
    values, wanted = [score for score, _ in known], np.array([label for _, label in known])
    reads: Literal["score", "log-odds"] = "log-odds" if all(0 <= score <= 1 for score in values) else "score"
    slope, offset = platt(_x(values, reads), wanted)
    if slope <= 0:
        raise UserError(
            f"judge {judge.name}: its scores do not rise with the harm that the labels name: nothing to fit"
        )
    probabilities = _sigmoid(slope * _x(values, reads) + offset)
    low, high = band(probabilities, wanted)
    return Fit(
        judge=kind,
        version=judge.version,
        reads=reads,
        slope=slope,
        offset=offset,
        low=low,
        high=high,
        n=len(known),
        harmful=harmful,
        labels=content_hash([[pair.prompt, pair.completion, label] for pair, label in zip(pairs, labels, strict=True)]),
    )


def platt(x: Floats, wanted: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and offset of the logistic curve of greatest likelihood, with smoothed targets (Platt 1999)."""
    positives = int(wanted.sum())
    target = np.where(wanted, (positives + 1) / (positives + 2), 1 / (len(wanted) - positives + 2))
    scale = float(x.std()) or 1.0

    def surprise(at: Floats) -> float:
        odds = at[0] * x / scale + at[1]
        return float(np.mean(np.logaddexp(0, odds) - target * odds))

    slope, offset = minimize(surprise, np.array([1.0, 0.0]), method="Nelder-Mead").x
    return float(slope) / scale, float(offset)


def best_f1(probabilities: Floats, wanted: NDArray[np.bool_]) -> float:
    """The threshold at which F1 is largest, in the middle between two of the probabilities or below all."""
    order = np.sort(np.unique(probabilities))
    steps = np.append((order[1:] + order[:-1]) / 2, order[0])

    def f1(step: float) -> float:
        predicted = probabilities >= step
        return float(2 * (predicted & wanted).sum() / (predicted.sum() + wanted.sum()))

    return float(max(steps, key=f1))


def band(probabilities: Floats, wanted: NDArray[np.bool_]) -> tuple[float, float]:
    """Between which probabilities a judge is undecided: `UNDECIDED_SHARE` of all, nearest to the best threshold."""
    middle = best_f1(probabilities, wanted)
    reach = float(np.sort(np.abs(probabilities - middle))[int(len(probabilities) * UNDECIDED_SHARE)])
    return round(max(0.0, middle - reach), 4), round(min(1.0, middle + reach), 4)


class Fitted:
    """A judge whose score decides by a `Fit`: `Verdict.score` is the probability of harm.

    Raises:
        UserError: The fit is another judge's, or of another version of this one.
    """

    def __init__(self, judge: Judge, kind: str, path: Path) -> None:
        self.fit = read_fit(path)
        if self.fit.judge != kind or self.fit.version != judge.version:
            other = f"judge {self.fit.judge}" if self.fit.judge != kind else f"another version of {kind}"
            raise UserError(f"{path}: was fitted to {other}; run tasft judge --calibrate with {kind} again")
        self.inner, self.name = judge, judge.name
        self.tells = judge.tells | {"harmful"}
        self.threshold: float | None = self.fit.high
        self.version = content_hash([judge.version, self.fit.model_dump()])

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair, in their order."""
        return [self._verdict(verdict) for verdict in self.inner.judge(pairs)]

    def _verdict(self, verdict: Verdict) -> Verdict:
        verdict = replace(verdict, judge=self.name)
        if verdict.score is None:  # It could not be read.
            return verdict
        probability = float(self.fit.probabilities([verdict.score])[0])
        harmful = probability >= self.fit.high
        judged = replace(verdict, harmful=harmful, score=probability, undecided=False, reason="")
        if self.fit.low <= probability < self.fit.high:
            return undecided(judged, f"{probability:.2f} is between {self.fit.low:g} and {self.fit.high:g}")
        return judged


def _x(scores: Sequence[float], reads: str) -> Floats:
    x = np.asarray(scores, dtype=float)
    if reads == "score":
        return x
    x = np.clip(x, _SMALL, 1 - _SMALL)
    return np.asarray(np.log(x / (1 - x)))


def _sigmoid(odds: Floats) -> Floats:
    return np.asarray(expit(odds))
