"""Logs of other tools as prompts and replies: Inspect, lm-eval, garak, promptfoo, PyRIT, OpenAI's batches."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasft.core.errors import UserError
from tasft.data.cells import joined
from tasft.data.files import Rows, kind_of, read_rows
from tasft.data.forms import turns_of

Row = Mapping[str, Any]
_Pairs = list[dict[str, Any]]


def read_log(path: Path) -> Rows | None:
    """Prompts and replies of a log, with `id`, `prompt`, `completion` and `set`; None of a file that is no log.

    What was generated is read: of several turns the last reply and the user's turn before it. A sample without a reply
    has an empty one, and each of several answers is a reply. The number is that of the row of the file; where it has
    none, of the sample.

    Args:
        path: `.eval` or JSON of Inspect, `samples_*.jsonl` of lm-eval, garak's `report.jsonl`, promptfoo's output as
            JSON, PyRIT's memory exported as JSON, or a folder with the input and the output of an OpenAI batch.

    Raises:
        UserError: It is one, and damaged, or holds no replies or those of several models; says what to do.
    """
    if path.is_dir():
        return _batch(path)
    if kind_of(path) == ".eval":
        return _inspect(path)
    if kind_of(path) == ".json" and (whole := _whole(path)) is not None:
        if {"eval", "status"} <= whole.keys():
            return _inspect(path)
        results = whole.get("results")
        if not isinstance(results, Mapping) or not isinstance(results.get("results"), list):
            return None
        providers = (row.get("provider") for row in results["results"] if isinstance(row, Mapping))
        models = (each.get("label") or each.get("id") if isinstance(each, Mapping) else each for each in providers)
        _require_one(path, models, "write a file for each: promptfoo eval --filter-providers NAME --output NAME.json")
        return _numbered(path, enumerate(results["results"], 1), _promptfoo)
    if kind_of(path) not in (".jsonl", ".json"):
        return None
    rows = read_rows(path)
    first = rows[0][1].keys()
    if {"resps", "arguments", "doc_id"} <= first:
        # A reply has a row for each filter that looked at it.
        return _numbered(path, [row for row in rows if row[1].get("filter") == rows[0][1].get("filter")], _lm_eval)
    if "entry_type" in first:
        # An attempt has a row when it is answered, with status 1, and another when it is evaluated.
        done = [row for row in rows if (row[1].get("entry_type"), row[1].get("status")) == ("attempt", 2)]
        return _numbered(path, done, _garak)
    if {"conversation_id", "role", "original_value"} <= first:
        return _pyrit(path, rows)
    if {"custom_id", "response"} <= first:
        raise UserError(f"{path}: the output of a batch has no prompts: put its input beside it and name the folder")
    return None


def _whole(path: Path) -> dict[str, Any] | None:
    try:
        log = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else None
    except (ValueError, OSError):  # A list or lines, whose reader says what is wrong with them.
        return None
    return log if isinstance(log, dict) else None


def _numbered(path: Path, rows: Any, pairs: Callable[[Any], _Pairs]) -> Rows:
    numbered: Rows = []
    faults = []
    for number, row in rows:
        try:
            numbered += [(number, pair) for pair in pairs(row)]
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            faults.append(f"{path}:{number}: not whole ({type(error).__name__}: {error})")
    if not numbered and not faults:
        faults.append(f"{path}: holds no replies")
    if faults:
        raise UserError(faults)
    return numbered


def _require_one(path: Path, models: Iterable[Any], advice: str) -> None:
    """Refuse the answers of several models, whose rates together would be those of none."""
    names = sorted(
        {model if isinstance(model, str) else json.dumps(model, sort_keys=True) for model in models if model}
    )
    if len(names) > 1:
        raise UserError(f"{path}: holds answers of {len(names)} models ({', '.join(names)}): {advice}")


def _pairs(name: str, task: str, said: Iterable[tuple[Any, Any]]) -> _Pairs:
    """Prompts and replies of a sample; those after the first have a number in their id."""
    return [
        {
            "id": f"{name}/{number}" if number > 1 else name,
            "prompt": _text(prompt),
            "completion": _text(reply),
            "set": task,
        }
        for number, (prompt, reply) in enumerate(said, 1)
    ]


def _text(value: Any) -> str:
    """The text of a message or of its parts; of several messages that of the user's last one."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return _text(value[next((key for key in ("turns", "content") if key in value), "text")])
    if turns := [turn for turn in value if isinstance(turn, Mapping) and "role" in turn]:
        return _text([turn for turn in turns if turn["role"] == "user"][-1])
    text = joined([{"content": value}])[0]["content"]
    if not isinstance(text, str):
        raise ValueError("a message that is not text alone: leave it out")
    return text


def _inspect(path: Path) -> Rows:
    try:
        from inspect_ai.log import read_eval_log
    except ImportError:
        raise UserError(f"{path} needs the package inspect_ai: pip install '.[inspect]'") from None
    try:
        log = read_eval_log(str(path))
    except Exception as error:  # of zip files, JSON and pydantic
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {reason:.200})") from error
    task = log.eval.task.rpartition("/")[2]

    def pairs(sample: Any) -> _Pairs:
        if sample.error is not None:  # It did not come to a reply.
            return []
        asked = sample.input if isinstance(sample.input, str) else [turn.model_dump() for turn in sample.input]
        name = f"{sample.id}" + (f"#{sample.epoch}" if sample.epoch > 1 else "")
        replies = [sample.output.completion, *(choice.message.text for choice in sample.output.choices[1:])]
        return _pairs(name, task, [(asked, reply) for reply in replies])

    return _numbered(path, enumerate(log.samples or [], 1), pairs)


def _lm_eval(row: Row) -> _Pairs:
    arguments = row["arguments"]
    requests = arguments.values() if isinstance(arguments, Mapping) else arguments
    asked = [one["arg_0"] if isinstance(one, Mapping) else one[0] for one in requests]
    said = [(prompt, reply) for prompt, repeats in zip(asked, row["resps"], strict=True) for reply in repeats]
    if not all(isinstance(reply, str) for _, reply in said):
        raise ValueError("a log-likelihood and no reply: take a task that generates")
    return _pairs(str(row["doc_id"]), "lm_eval", said)


def _garak(row: Row) -> _Pairs:
    return _pairs(row["uuid"], row["probe_classname"], [(row["prompt"], reply) for reply in row["outputs"]])


def _promptfoo(row: Row) -> _Pairs:
    prompt, reply = row["prompt"], (row.get("response") or {}).get("output")
    name = str(row.get("id") or f"{row.get('testIdx', 0)}-{row.get('promptIdx', 0)}")
    # A conversation is there as the text of its JSON, and what a schema or a call of a tool gave as an object.
    asked = turns_of(prompt["raw"] if isinstance(prompt, Mapping) else prompt)
    said = reply if isinstance(reply, str | None) else json.dumps(reply, ensure_ascii=False)
    return _pairs(name, "promptfoo", [(asked, said)])


def _pyrit(path: Path, rows: Rows) -> Rows:
    talks: dict[str, list[tuple[int, Row]]] = {}
    for number, row in rows:
        talks.setdefault(str(row.get("conversation_id")), []).append((number, row))

    def pairs(talk: Sequence[tuple[int, Row]]) -> _Pairs:
        turns = sorted((row for _, row in talk), key=lambda row: row["sequence"])
        asked = [row for row in turns if row["role"] == "user"]
        replies = [row for row in turns if row["role"] == "assistant"]
        if not asked or not replies:
            return []
        prompt, reply = (last.get("converted_value") or last["original_value"] for last in (asked[-1], replies[-1]))
        return _pairs(turns[0]["conversation_id"], "pyrit", [(prompt, reply)])

    targets = (row.get("prompt_target_identifier") for _, row in rows if row.get("role") == "assistant")
    _require_one(path, targets, "export the conversations of one")
    return _numbered(path, [(talk[0][0], talk) for talk in talks.values()], pairs)


def _batch(folder: Path) -> Rows | None:
    """The answers of a batch with the prompts of its input, known by their `custom_id`."""
    files = sorted(path for path in folder.iterdir() if kind_of(path) == ".jsonl")
    rows = [(number, row) for path in files for number, row in read_rows(path) if "custom_id" in row]
    bodies = {row["custom_id"]: row["body"] for _, row in rows if isinstance(row.get("body"), Mapping)}
    answers = [(number, row) for number, row in rows if "response" in row]
    if not answers:
        return None

    def pairs(row: Row) -> _Pairs:
        body = (row["response"] or {}).get("body") or {}
        choices = body.get("choices") or [{"message": {"content": None}}]
        asked = bodies[row["custom_id"]]["messages"]
        return _pairs(row["custom_id"], "batch", [(asked, choice["message"]["content"]) for choice in choices])

    _require_one(folder, (body.get("model") for body in bodies.values()), "make a folder for each")

    return _numbered(folder, answers, pairs)
