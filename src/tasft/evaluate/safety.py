"""Replies to prompt sets and what judges say of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasft.core import ranks
from tasft.core.measures import TOLD
from tasft.core.provenance import write_json
from tasft.core.stats import Estimate, mean, rate
from tasft.data.rows import Prompt
from tasft.judges import Judge, Verdict
from tasft.judges.judging import UNKNOWN, Usual, judge_replies
from tasft.models.engine import Engine, Reply, Sampling, collect, decided, requests_for, thoughts


def answer(
    engine: Engine, about: dict[str, Any], prompts: Sequence[Prompt], sampling: Sampling, folder: Path
) -> list[Reply]:
    """Replies to one set in `folder/replies.jsonl`.

    `folder/set.json` has its name, kind and source, who was asked, and as `drawn` what decided the replies.
    """
    if ranks.is_first():
        asked = {"n": len(prompts), "ids": [prompt.id for prompt in prompts], "drawn": decided(engine, sampling)}
        write_json(folder / "set.json", about | asked)
    return collect(engine, requests_for(prompts), sampling, folder / "replies.jsonl", about["name"])


def judge_answers(
    judge: Judge,
    replies: Sequence[Reply],
    folder: Path,
    about: dict[str, Any],
    usual: Usual = UNKNOWN,
    topics: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Verdicts of one judge in `folder/verdicts.jsonl` and their rates in `folder/summary.json`.

    Args:
        judge: Who judges.
        replies: To one set.
        folder: Of this set and judge.
        about: What else the summary says: recipe, commit.
        usual: What coherent replies are held to besides their text.
        topics: Of the prompts, by the id of the reply; see `summarise`.
    """
    verdicts = judge_replies(judge, replies, folder / "verdicts.jsonl", usual)
    summary = {**summarise(verdicts, replies, topics), "limits": usual.limits, "judge": judge.name, **about}
    if ranks.is_first():
        write_json(folder / "summary.json", summary)
    return summary


def summarise(
    verdicts: Sequence[Verdict], replies: Sequence[Reply], topics: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Rates with Wilson intervals, each in [0, 1], and the mean of the judge's scores in its own unit.

    `safe_coherent`: not harmful and coherent, the headline on toxic prompts. `off_topic`: about something else than was
    asked, of the replies whose topic was looked at. `undecided`: absent where the judge never is. `causes`: of
    incoherent replies, the count of each reason that `tasft.judges.coherence` gave, where the judge could be read.
    `refusal`: full or partial, and each of them where the judge tells them apart. `distinct`: share of different
    replies, so that one canned sentence shows.
    What a judge does not tell has n = 0. A verdict that could not be read leaves the n of what it would have told,
    and is counted in `unreadable`; a reply that a provider withheld, in `no_reply`. `score` is over the replies that
    the judge was sent. `thoughts`: as `tasft.models.engine.thoughts`.

    Args:
        verdicts: On the replies, in their order.
        replies: To one set.
        topics: Of their prompts, by the id of the reply. With any, `by_topic` has the rates of each topic.
    """

    def rates(some: Sequence[Verdict]) -> dict[str, Any]:
        rows = [vars(verdict) for verdict in some]
        outcomes = {
            name: [value for row in rows if (value := told_of(row)) is not None] for name, told_of in TOLD.items()
        }
        return {name: asdict(rate(outcomes[name])) for name in TOLD if name != "undecided" or outcomes[name]}

    by_topic: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if topic := (topics or {}).get(verdict.id):
            by_topic.setdefault(topic, []).append(verdict)
    causes = [verdict.reason for verdict in verdicts if not verdict.coherent and verdict.has_cause]
    n = len(replies)
    different = len({reply.completion for reply in replies}) / n if n else None
    return {
        **rates(verdicts),
        "causes": dict(Counter(causes).most_common()),
        "score": asdict(mean([verdict.score for verdict in verdicts if verdict.score is not None])),
        "distinct": asdict(Estimate(different, None, None, n)),
        "unreadable": sum(verdict.unreadable for verdict in verdicts),
        "no_reply": sum(bool(reply.note) for reply in replies),
        "thoughts": thoughts(replies),
        **({"by_topic": {topic: rates(some) for topic, some in sorted(by_topic.items())}} if by_topic else {}),
    }
