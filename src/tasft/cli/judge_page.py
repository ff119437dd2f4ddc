"""A page that shows how far a judge can be trusted: curves over its threshold, and its surest mistakes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tasft.core.provenance import atomic_write_text
from tasft.evaluate.judge_quality import YES_NO
from tasft.evaluate.judge_text import figure
from tasft.report.blocks import Block, Code, Document, Paragraph, Pictures, Plot, Section, Table, Verdict
from tasft.report.drawing import LIGHT, SERIES, plot
from tasft.report.page import page

MISTAKES = 20


def write_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write what `judge_quality.score` found against labels as one HTML file, replies of `MISTAKES` included."""
    measured, (judge,) = result["labels"], result["judges"]
    yes, no = YES_NO[measured["of"]]
    names = ("accuracy", "precision", "recall", "f1", "auroc")
    agreement: list[Block] = [
        Table(
            "Agreement with labels",
            ("Measure", "Value, 95% interval by bootstrap over prompts"),
            [(name, figure(measured[name])) for name in names if measured[name]],
        ),
        Table(
            "Confusion table",
            ("Label", f"judge: {yes}", f"judge: {no}"),
            [(word, *(f"{count:,}" for count in row)) for word, row in zip((yes, no), measured["table"], strict=True)],
        ),
    ]
    sections = [Section("Agreement", agreement)]
    if measured["curve"]:
        drawn = curve_plot(measured["curve"], judge["threshold"])
        sections.append(Section("Thresholds", [Pictures([(drawn, "What another threshold would give.")])]))
    shown = [row for row in result["differences"][:MISTAKES] if "prompt" in row]
    mistakes = [Code(_title(row, yes, no), f"{row['prompt']}\n\n>>> {row['completion']}", "text") for row in shown]
    words = f"The {len(shown)} of {len(result['differences'])} in which the judge is surest; open one to read it."
    sections.append(Section("Mistakes", [Paragraph(words, small=True), *mistakes] if mistakes else []))
    untold = f"; {measured['untold']:,} left out without a verdict" if measured["untold"] else ""
    sentence = f"{measured['n']:,} labelled pairs, {measured['positives']:,} {yes} by label{untold}."
    sentences = [f"Precision {figure(measured['precision'])}, recall {figure(measured['recall'])}.", sentence]
    footer = f"{result['file']}; verdicts in {judge['verdicts']}, judge version {judge['version']}"
    document = Document("Judge against labels", judge["name"], Verdict("", "", "", sentences), sections, footer)
    atomic_write_text(path, page(document))


def _title(row: Mapping[str, Any], yes: str, no: str) -> str:
    score = "" if row["score"] is None else f", score {row['score']:.3g}"
    return f"{row['id']:.40}: label {yes if row['first'] else no}, judge {yes if row['second'] else no}{score}"


def curve_plot(curve: Sequence[Sequence[float]], threshold: float | None) -> Plot:
    """Precision, recall and F1 over the threshold; the judge's own is marked."""
    steps, *lines = np.array(curve).T

    def draw(axes: Axes) -> None:
        for name, line, colour in zip(("precision", "recall", "F1"), lines, SERIES, strict=False):
            axes.step(steps, 100 * line, where="pre", label=name, color=colour, linewidth=1.6)
        if threshold is not None:
            axes.axvline(threshold, color=LIGHT["ink"], linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 102)
        axes.set_xlabel("threshold")
        axes.set_ylabel("%")
        axes.grid(color=LIGHT["grid"], linewidth=0.8)
        axes.legend(frameon=False, fontsize=8.5)

    precision, recall, f1 = lines
    best = int(np.argmax(f1))
    alt = f"F1 is largest, {f1[best]:.2f}, at threshold {steps[best]:.3g}, with precision {precision[best]:.2f} and "
    return plot(draw, "Precision, recall and F1 over the threshold", f"{alt}recall {recall[best]:.2f}.", height=3.4)
