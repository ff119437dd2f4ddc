"""A page that shows how far a judge can be trusted: curves over its threshold, and its surest mistakes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from tasft.core.provenance import atomic_write_text
from tasft.evaluate.judge_quality import YES_NO, Pairs, figure
from tasft.judges import Verdict
from tasft.report.blocks import PAGE, Block, Code, Document, Paragraph, Pictures, Plot, Section, Table
from tasft.report.blocks import Verdict as Opening
from tasft.report.drawing import LIGHT, SERIES, plot
from tasft.report.page import page

MISTAKES = 20
CURVE = ("precision", "recall", "F1")


def write_page(path: Path, result: Mapping[str, Any], pairs: Pairs, verdicts: Sequence[Verdict]) -> None:
    """Write what `judge_quality.score` found against labels as one HTML file, replies included.

    Args:
        path: The file.
        result: What it gave, with labels.
        pairs: The labelled pairs.
        verdicts: The judge's, in their order.
    """
    about, (judge,) = result["labels"], result["judges"]
    yes, no = YES_NO[about["of"]]
    rows = [(name, figure(about[name])) for name in ("accuracy", "precision", "recall", "f1", "auroc") if about[name]]
    blocks: list[Block] = [
        Table("Agreement with labels", ("Measure", "Value, 95% interval by bootstrap over prompts"), rows),
        Table(
            "Confusion table",
            ("Label", f"judge: {yes}", f"judge: {no}"),
            [(word, *(f"{count:,}" for count in row)) for word, row in zip((yes, no), about["table"], strict=True)],
        ),
    ]
    scored = [
        (verdict.score, label)
        for verdict, label in zip(verdicts, pairs.labels or (), strict=True)
        if about["of"] == "harm" and verdict.score is not None
    ]
    sections = [Section("Agreement", blocks, frozenset({PAGE}))]
    if len({label for _, label in scored}) == 2:
        drawn = curve_plot([score for score, _ in scored], [label for _, label in scored], judge.get("threshold"))
        sections.append(Section("Thresholds", [Pictures([(drawn, "What another threshold would give.")])]))
    texts = {reply.id: reply for reply in pairs.replies}
    mistakes: list[Block] = [
        Code(_title(row, yes, no), f"{texts[row['id']].prompt}\n\n>>> {texts[row['id']].completion}", "text")
        for row in result["differences"][:MISTAKES]
    ]
    words = f"The {len(mistakes)} of {len(result['differences'])} in which the judge is surest; open one to read it."
    sections.append(Section("Mistakes", [Paragraph(words, small=True), *mistakes] if mistakes else []))
    untold = f"; {about['untold']:,} left out without a verdict" if about["untold"] else ""
    sentence = f"{about['n']:,} labelled pairs, {about['positives']:,} {yes} by label{untold}."
    opening = Opening(
        "", "", "", [f"Precision {figure(about['precision'])}, recall {figure(about['recall'])}.", sentence]
    )
    footer = f"{result['file']}; verdicts in {judge['verdicts']}, judge version {judge['version']}"
    atomic_write_text(path, page(Document("Judge against labels", judge["name"], opening, sections, footer)))


def _title(row: Mapping[str, Any], yes: str, no: str) -> str:
    score = "" if row["score"] is None else f", score {row['score']:.3g}"
    return f"{row['id']:.40}: label {yes if row['first'] else no}, judge {yes if row['second'] else no}{score}"


def curves(scores: Sequence[float], labels: Sequence[bool]) -> tuple[NDArray[np.float64], ...]:
    """Thresholds, and precision, recall and F1 of each: a score of at least it is called harmful."""
    values, wanted = np.asarray(scores), np.asarray(labels, dtype=bool)
    order = np.argsort(-values, kind="stable")
    last = np.append(np.diff(values[order]) != 0, True)  # One point for each different score.
    hits, said = np.cumsum(wanted[order])[last], np.arange(1, len(values) + 1)[last]
    return values[order][last], hits / said, hits / wanted.sum(), 2 * hits / (said + wanted.sum())


def curve_plot(scores: Sequence[float], labels: Sequence[bool], threshold: float | None) -> Plot:
    """Precision, recall and F1 over the threshold; the judge's own is marked."""
    steps, *lines = curves(scores, labels)

    def draw(axes: Axes) -> None:
        for name, line, colour in zip(CURVE, lines, SERIES, strict=False):
            axes.step(steps, 100 * line, where="pre", label=name, color=colour, linewidth=1.6)
        if threshold is not None:
            axes.axvline(threshold, color=LIGHT["ink"], linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 102)
        axes.set_xlabel("threshold")
        axes.set_ylabel("%")
        axes.grid(color=LIGHT["grid"], linewidth=0.8)
        axes.legend(frameon=False, fontsize=8.5)

    best = int(np.argmax(lines[2]))
    alt = f"F1 is largest, {lines[2][best]:.2f}, at threshold {steps[best]:.3g}, with precision {lines[0][best]:.2f} "
    alt += f"and recall {lines[1][best]:.2f}."
    return plot(draw, "Precision, recall and F1 over the threshold", alt, height=3.4)
