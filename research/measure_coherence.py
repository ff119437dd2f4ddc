"""Measures what `tasft.judges.coherence` catches, and what it flags by mistake, and writes both down.

    python research/measure_coherence.py --limit-from SAMPLED.jsonl REPLIES.jsonl [REPLIES.jsonl ...]

Rows have `prompt` and `completion`, and `loss_nats` where the model is at hand: the mean loss in nats per token under
it. All are replies to benign prompts, so that every flag counts as a false alarm (a small model that really loops
makes some of them right: read them, they are printed). Those of the last file are also given to the prompt of the row
after theirs, where they should be flagged. The limit on the loss is taken from SAMPLED.jsonl, which should hold replies
to other prompts. Writes docs/results/coherence.json and the table between the `coherence` markers of
docs/coherence.md.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from pages import put

from tasft.core.stats import Estimate, rate
from tasft.data.files import read_rows
from tasft.judges.coherence import MIN_SIMILARITY, incoherence, loss_limit
from tasft.judges.judging import Usual, similarities
from tasft.models.engine import Reply

ROOT = Path(__file__).parents[1]
COLLAPSES = ROOT / "tests" / "fixtures" / "collapses.jsonl"


def measured(reasons: Sequence[str | None]) -> dict[str, Any]:
    """Rate of incoherent replies with its interval, and how many there are for each reason."""
    counts = Counter(reason for reason in reasons if reason)
    return {
        "flagged": counts.total(),
        **asdict(rate([reason is not None for reason in reasons])),
        "reasons": dict(counts.most_common()),
    }


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


def reply(number: int, row: dict[str, Any]) -> Reply:
    return Reply(str(number), "", row["prompt"], row["completion"], "stop", 0, 0)


def on_replies(name: str, found: Sequence[dict[str, Any]], limit: float) -> dict[str, Any]:
    losses = {str(number): row.get("loss_nats") for number, row in enumerate(found)}
    replies = [reply(number, row) for number, row in enumerate(found)]
    figures = Usual(similarities=similarities).figures(replies)
    reasons = [
        incoherence(each.prompt, each.completion, loss_nats=losses[each.id], loss_limit_nats=limit, **figures[each.id])
        for each in replies
    ]
    for each, reason in zip(replies, reasons, strict=True):
        if reason:
            print(f"{name}: {reason}: {each.prompt!r:.100} -> {each.completion!r:.300}")
    return measured(reasons)


def line(name: str, found: dict[str, Any]) -> str:
    share = Estimate(found["value"], found["low"], found["high"], found["n"])
    reasons = ", ".join(f"{reason} {count}" for reason, count in found["reasons"].items()) or "none"
    return (
        f"| {name} | {found['flagged']} of {share.n} | {share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
        f" | {reasons} |"
    )


def section(result: dict[str, Any]) -> str:
    """What docs/coherence.md says of a measurement."""
    table = [
        "| replies | flagged | rate (95% Wilson interval) | reasons |",
        "|---|---|---|---|",
        line("collapses (should be flagged)", result["collapses"]),
        line("the last replies below, each to the prompt of the next (should be flagged)", result["of another prompt"]),
        *(line(f"benign: {name}", found) for name, found in result["benign"].items()),
    ]
    note = (
        f"Limit on the mean loss where it is known: {result['loss_limit_nats']:.2f} nats per token. The rules were "
        "written with the collapses and these replies in sight: the table says that they do what they were made for, "
        "not how they do elsewhere."
    )
    return "\n".join([*table, "", note, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure tasft.judges.coherence on collapses and benign replies.")
    parser.add_argument("replies", type=Path, nargs="+")
    parser.add_argument("--limit-from", type=Path, required=True)
    asked = parser.parse_args()

    limit = loss_limit([row["loss_nats"] for row in rows(asked.limit_from)])
    collapses = measured([incoherence(row["prompt"], row["reply"]) for row in rows(COLLAPSES)])
    sets = {path.stem.replace("_", " "): rows(path) for path in asked.replies}
    benign = {name: on_replies(name, found, limit) for name, found in sets.items()}
    last = list(sets.values())[-1]
    moved = [{"prompt": after["prompt"], "completion": row["completion"]} for row, after in pairwise([*last, last[0]])]
    wrong = on_replies("of another prompt", moved, limit)
    result = {
        "loss_limit_nats": limit,
        "min_similarity": MIN_SIMILARITY,
        "collapses": collapses,
        "benign": benign,
        "of another prompt": wrong,
    }
    (ROOT / "docs" / "results" / "coherence.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    put(ROOT / "docs" / "coherence.md", "coherence", section(result))
    print(section(result))


if __name__ == "__main__":
    main()
