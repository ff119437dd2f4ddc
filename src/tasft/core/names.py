"""Names that a recipe may use, known without the packages that stand behind them."""

PENALTIES = ("emd", "emd_exact", "emd_hinge", "nlcl", "unlikelihood", "npo", "npo_mean", "simnpo", "ascent")
"""Of `tasft.loss.PENALTIES`, in its order."""
