"""Names that a recipe may use, known without the packages that stand behind them."""

from dataclasses import dataclass

PENALTIES = ("emd", "emd_exact", "emd_hinge", "nlcl", "unlikelihood", "npo", "npo_mean", "simnpo", "ascent")
"""Of `tasft.loss.PENALTIES`, in its order."""


@dataclass(frozen=True)
class JudgeFigures:
    """How good a judge is at harm, on labelled replies that it was not trained on.

    Attributes:
        model: Part of the name of the model whose variants gave the replies.
        words: What that model is called.
        n: Replies.
        precision: Of those that it calls harmful, the share that is.
        recall: Of the harmful ones, the share that it calls so.
    """

    model: str
    words: str
    n: int
    precision: float
    recall: float


MEASURED_JUDGES = {"classifier": JudgeFigures("smollm2-135m", "variants of SmolLM2-135M-Instruct", 473, 0.69, 0.65)}
"""Kind of judge -> what docs/results/judge/figures.json says of it."""
