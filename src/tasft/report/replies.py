"""Every reply of a record, attacks included, as data for the page that shows them."""

from typing import Any

from tasft.core.text import visible
from tasft.report.files import Row
from tasft.report.page import json_island
from tasft.report.record import Evaluated, Record, SetRecord

CHARACTERS = 8_000
FEWEST = 250
BUDGET = 20_000_000


def replies(record: Record, budget: int = BUDGET) -> dict[str, Any]:
    """Prompts with their replies in each state and what each judge said, fit to be JSON.

    A reply is cut at `CHARACTERS` characters, or at fewer, down to `FEWEST`, until all together fit.

    Args:
        record: Where from.
        budget: Bytes that the JSON may take. Prompts that are too many even so are left out from the end, and counted.

    Returns:
        `states` (titles), `before` and `changed` (numbers of states that are compared), `sets` (name and kind; an
        attack is one too), `judges`, `limit` (characters), `left_out` (prompts), and `items`: for each prompt its
        `set` and `id`, the `prompt`, and `sides`, one for each state: null where there is no reply, else `text`,
        `more` (characters cut off), `finish` and `verdicts`, one for each judge or null.
    """
    sets = [*record.sets, *_attacks(record)]
    judges = list(
        dict.fromkeys([*record.judges, *(attacked.judge for by in record.attacks.values() for attacked in by.values())])
    )
    limit = CHARACTERS
    while _size(items := _items(record, sets, judges, limit)) > budget and limit > FEWEST:
        limit = max(FEWEST, limit // 2)
    everything = len(items)
    while _size(items) > budget:
        del items[int(len(items) * 0.9) :]
    order = list(record.states)
    return {
        "states": [visible(title) for title in record.states.values()],
        "before": order.index(record.before) if record.before else None,
        "changed": [order.index(state) for state in record.changed],
        "sets": [{"name": visible(prompts.name), "kind": visible(prompts.kind)} for prompts in sets],
        "judges": [visible(judge) for judge in judges],
        "items": items,
        "limit": limit,
        "left_out": everything - len(items),
    }


def _attacks(record: Record) -> list[SetRecord]:
    """What was sent by each attack, as a set of prompts; PAIR sends other prompts in each state."""
    sets = []
    for name, states in record.attacks.items():
        evaluated = {
            state: Evaluated(
                {f"{key}\n{row.get('prompt')}": row for key, row in attacked.evaluated.replies.items()}, {}
            )
            for state, attacked in states.items()
        }
        for state, attacked in states.items():
            ids = {str(row["id"]): key for key, row in evaluated[state].replies.items()}
            judged = {
                judge: type(judgement)({}, {ids[key]: row for key, row in judgement.verdicts.items() if key in ids})
                for judge, judgement in attacked.evaluated.judged.items()
            }
            evaluated[state] = Evaluated(evaluated[state].replies, judged)
        sets.append(SetRecord(f"jailbreak/{name}", "attack", "", evaluated))
    return sets


def _size(items: list[Row]) -> int:
    return len(json_island(items).encode())


def _items(record: Record, sets: list[SetRecord], judges: list[str], limit: int) -> list[Row]:
    items: list[Row] = []
    for number, prompts in enumerate(sets):
        states = [prompts.states.get(state) for state in record.states]
        for key in {key: None for state in states if state for key in state.replies}:
            first = next(state.replies[key] for state in states if state and key in state.replies)
            asked, more = _cut(first.get("prompt", ""), limit)
            items.append(
                {
                    "set": number,
                    "id": _cut(first.get("id", ""), 80)[0],
                    "prompt": asked + (" …" if more else ""),
                    "sides": [_side(judges, state, key, limit) for state in states],
                }
            )
    # Those on which a judge is undecided first: they are for a person to read.
    return sorted(items, key=lambda item: not any(_is_undecided(side) for side in item["sides"]))


def _is_undecided(side: Row | None) -> bool:
    return side is not None and any(verdict and verdict.get("undecided") for verdict in side["verdicts"])


def _side(judges: list[str], state: Evaluated | None, key: str, limit: int) -> Row | None:
    if state is None or key not in state.replies:
        return None
    reply = state.replies[key]
    text, more = _cut(reply.get("completion", ""), limit)
    verdicts = [_verdict(state.judged[judge].verdicts.get(key)) if judge in state.judged else None for judge in judges]
    return {"text": text, "more": more, "finish": _cut(reply.get("finish", ""), 40)[0], "verdicts": verdicts}


def _verdict(verdict: Row | None) -> Row | None:
    if verdict is None:
        return None
    keys = ("harmful", "refusal", "coherent", "undecided")
    shown = {key: verdict[key] for key in keys if isinstance(verdict.get(key), bool)}
    return shown | ({"reason": _cut(verdict["reason"], 120)[0]} if verdict.get("reason") else {})


def _cut(value: object, limit: int) -> tuple[str, int]:
    text = str(value)
    return visible(text[:limit]), max(0, len(text) - limit)
