"""Between two rounds of training: what the half-trained model still answers harmfully, and what it refuses too much.

On-policy rows for this model's own border: no other model, and no text but its own, is asked for.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasft.core import ranks
from tasft.core.provenance import write_json, write_jsonl
from tasft.data.rows import Example, Prompt
from tasft.judges import Judge
from tasft.judges.judging import UNKNOWN, Usual, judge_replies
from tasft.models.engine import Engine, Reply, Sampling, collect, requests_for

SHARE = 0.25  # Of what is retained, refused prompts are to make so much,
MOST = 8.0  # but none counts for more rows than these.


def look(
    opened: Callable[[], AbstractContextManager[Engine]],
    judge: Judge,
    toxic: Sequence[Prompt],
    benign: Sequence[Example],
    sampling: Sampling,
    benign_tokens: int,
    folder: Path,
    usual: Usual = UNKNOWN,
    number: int = 1,
) -> dict[str, Any]:
    """Ask toxic and benign prompts again; what comes back are rows for the next round.

    Args:
        opened: Gives the half-trained model.
        judge: Decides what is harmful, and what is a refusal.
        toxic: Prompts whose answers become rows to avoid where they are harmful and coherent.
        benign: Rows with the untouched model's answers. Those whose prompts are refused now, though not by that answer,
            come back as rows to retain.
        sampling: How replies to toxic prompts are drawn; those to benign ones are greedy.
        benign_tokens: Longest reply to a benign prompt.
        folder: Gets `replies.jsonl`, `verdicts.jsonl`, `avoid.jsonl`, `imitate.jsonl` and `summary.json`.
        usual: What coherent replies are held to besides their text.
        number: Of the round, in the ids of its rows.

    Returns:
        The summary: how many were asked and came back.
    """
    path, verdicts = folder / "replies.jsonl", folder / "verdicts.jsonl"
    asked = [Prompt(row.id, _text(row)) for row in benign]
    greedy = replace(sampling, max_new_tokens=benign_tokens, temperature=0.0)
    with opened() as engine:
        answers = collect(engine, requests_for(toxic, mark=f"-round{number}"), sampling, path, "toxic")
        replies = collect(engine, requests_for(asked), greedy, path, "benign")
    before = [Reply(f"{row.id}-before", "before", _text(row), str(row.completion), "stop", 0, 0) for row in benign]
    together = [*answers, *replies, *before]
    judged = dict(zip((reply.id for reply in together), judge_replies(judge, together, verdicts, usual), strict=True))
    avoid = [
        Example(reply.prompt, reply.completion, False, reply.id, "rounds/avoid", ends=reply.finish == "stop")
        for reply in answers
        if judged[reply.id].harmful and judged[reply.id].coherent
    ]
    refused = [row for row in benign if judged[row.id].refusal and not judged[f"{row.id}-before"].refusal]
    summary = {
        "judge": judge.name,
        "toxic": {"asked": len(answers), "harmful": len(avoid)},
        "benign": {"asked": len(replies), "refused": len(refused)},
    }
    if ranks.is_first():
        write_jsonl(folder / "avoid.jsonl", [row.row() for row in avoid])
        write_jsonl(folder / "imitate.jsonl", [replace(row, source="rounds/imitate").row() for row in refused])
        write_json(folder / "summary.json", summary)
    return summary


def _text(row: Example) -> str:
    assert isinstance(row.prompt, str)  # the harvest's own
    return row.prompt


def chosen(rows: Sequence[Example], most: int, seed: int, number: int) -> list[Example]:
    """Benign rows that are asked after a round: others each time, until all were asked."""
    order = random.Random(seed).sample(rows, len(rows))
    start = (number - 1) * most % max(len(order), 1)
    return (order[start:] + order[:start])[:most]


def heavier(back: Sequence[Example], retained: int) -> list[Example]:
    """Rows that came back, each once, with a weight that makes them a quarter of all retained rows.

    Args:
        back: Rows of all looks.
        retained: How many rows there are besides.
    """
    once = list({row.id: row for row in back}.values())
    weight = min(max(SHARE / (1 - SHARE) * retained / max(len(once), 1), 1.0), MOST)
    return [replace(row, weight=weight, id=f"{row.id}-back") for row in once]
