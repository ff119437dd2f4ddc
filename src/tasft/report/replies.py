"""Every reply of a run, as data for the page that shows them."""

from typing import Any

from tasft.core.text import visible
from tasft.report.page import json_island
from tasft.report.read import STATES, Evaluated, Row, Run

CHARACTERS = 8_000
FEWEST = 250
BUDGET = 20_000_000


def replies(run: Run, budget: int = BUDGET) -> dict[str, Any]:
    """Prompts with their replies before and after and what each judge said, fit to be JSON.

    A reply is cut at `CHARACTERS` characters, or at fewer, down to `FEWEST`, until all together fit.

    Args:
        run: Where from.
        budget: Bytes that the JSON may take. Prompts that are too many even so are left out from the end, and counted.

    Returns:
        `sets` (name and kind), `judges`, `limit` (characters), `left_out` (prompts), and `items`: for each prompt
        its `set` and `id`, the `prompt`, and `sides`, before and after: null where there is no reply, else `text`,
        `more` (characters cut off), `finish` and `verdicts`, one for each judge or null.
    """
    limit = CHARACTERS
    while _size(items := _items(run, limit)) > budget and limit > FEWEST:
        limit = max(FEWEST, limit // 2)
    everything = len(items)
    while _size(items) > budget:
        del items[int(len(items) * 0.9) :]
    return {
        "sets": [{"name": visible(prompts.name), "kind": visible(prompts.kind)} for prompts in run.sets],
        "judges": [visible(judge) for judge in run.judges],
        "items": items,
        "limit": limit,
        "left_out": everything - len(items),
    }


def _size(items: list[Row]) -> int:
    return len(json_island(items).encode())


def _items(run: Run, limit: int) -> list[Row]:
    items: list[Row] = []
    for number, prompts in enumerate(run.sets):
        states = [prompts.states.get(state) for state in STATES]
        for key in {key: None for state in states if state for key in state.replies}:
            first = next(state.replies[key] for state in states if state and key in state.replies)
            asked, more = _cut(first.get("prompt", ""), limit)
            items.append(
                {
                    "set": number,
                    "id": _cut(key, 80)[0],
                    "prompt": asked + (" …" if more else ""),
                    "sides": [_side(run, state, key, limit) for state in states],
                }
            )
    return items


def _side(run: Run, state: Evaluated | None, key: str, limit: int) -> Row | None:
    if state is None or key not in state.replies:
        return None
    reply = state.replies[key]
    text, more = _cut(reply.get("completion", ""), limit)
    verdicts = [
        _verdict(state.judged[judge].verdicts.get(key)) if judge in state.judged else None for judge in run.judges
    ]
    return {"text": text, "more": more, "finish": _cut(reply.get("finish", ""), 40)[0], "verdicts": verdicts}


def _verdict(verdict: Row | None) -> Row | None:
    if verdict is None:
        return None
    said = {key: verdict[key] for key in ("harmful", "refusal", "coherent") if isinstance(verdict.get(key), bool)}
    return said | ({"reason": _cut(verdict["reason"], 120)[0]} if verdict.get("reason") else {})


def _cut(value: object, limit: int) -> tuple[str, int]:
    text = str(value)
    return visible(text[:limit]), max(0, len(text) - limit)
