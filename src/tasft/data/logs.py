"""Logs of other tools as prompts and replies: Inspect, lm-eval, garak, promptfoo, PyRIT, OpenAI's batches."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasft.core.errors import UserError
from tasft.data.files import Rows, kind_of, read_rows

Row = Mapping[str, Any]
_Pairs = list[dict[str, Any]]


def read_log(path: Path) -> Rows | None:
    """Prompts and replies of a log, with `id`, `prompt`, `completion` and `set`; None of a file that is no log.

    What was generated is read: of several turns the last reply and the user's turn before it. A sample without a reply
    has an empty one. The number is that of the row of the file; where it has none, of the sample.

    Args:
        path: `.eval` or JSON of Inspect, `samples_*.jsonl` of lm-eval, garak's `report.jsonl`, promptfoo's output as
            JSON, PyRIT's memory exported as JSON, or a folder with the input and the output of an OpenAI batch.

    Raises:
        UserError: It is one, and damaged, or holds no replies; says what to do.
    """
    if path.is_dir():
        return _batch(path)
    if kind_of(path) == ".eval":
        return _inspect(path)
    if kind_of(path) == ".json" and (whole := _whole(path)) is not None:
        if {"eval", "status"} <= whole.keys():
            return _inspect(path)
        results = whole.get("results")
        if isinstance(results, Mapping) and isinstance(results.get("results"), list):
            return _numbered(path, enumerate(results["results"], 1), _promptfoo)
        return None
    if kind_of(path) not in (".jsonl", ".json"):
        return None
    rows = read_rows(path)
    first = rows[0][1].keys()
    if {"resps", "arguments", "doc_id"} <= first:
        # A reply has a row for each filter that looked at it.
        return _numbered(path, [row for row in rows if row[1].get("filter") == rows[0][1].get("filter")], _lm_eval)
    if "entry_type" in first:
        return _numbered(path, [row for row in rows if row[1].get("entry_type") == "attempt"], _garak)
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


def _pair(name: str, prompt: Any, reply: Any, task: str) -> dict[str, Any]:
    return {"id": name, "prompt": _text(prompt), "completion": _text(reply), "set": task}


def _text(value: Any) -> str:
    """The text of a message, or of the user's last one."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = value["turns"] if "turns" in value else value.get("content", value.get("text"))
        return _text(value)
    turns = [turn for turn in value if turn.get("role", "user") == "user"]
    return _text(turns[-1])


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
        return [_pair(name, asked, sample.output.completion, task)]

    return _numbered(path, enumerate(log.samples or [], 1), pairs)


def _lm_eval(row: Row) -> _Pairs:
    reply = row["resps"][0][0]
    if not isinstance(reply, str):
        raise ValueError("a log-likelihood and no reply: take a task that generates")
    arguments = row["arguments"]
    prompt = arguments["gen_args_0"]["arg_0"] if isinstance(arguments, Mapping) else arguments[0][0]
    return [_pair(str(row["doc_id"]), prompt, reply, "lm_eval")]


def _garak(row: Row) -> _Pairs:
    return [
        _pair(f"{row['uuid']}#{number}", row["prompt"], reply, row["probe_classname"])
        for number, reply in enumerate(row["outputs"])
    ]


def _promptfoo(row: Row) -> _Pairs:
    prompt = row["prompt"]
    reply = (row.get("response") or {}).get("output")
    name = str(row.get("id") or f"{row.get('testIdx', 0)}-{row.get('promptIdx', 0)}")
    raw = prompt["raw"] if isinstance(prompt, Mapping) else prompt
    try:
        raw = json.loads(raw)  # A conversation is there as the text of its JSON.
    except ValueError:
        return [_pair(name, raw, reply, "promptfoo")]
    return [_pair(name, raw if isinstance(raw, list) else prompt["raw"], reply, "promptfoo")]


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
        return [_pair(turns[0]["conversation_id"], prompt, reply, "pyrit")]

    return _numbered(path, [(talk[0][0], talk) for talk in talks.values()], pairs)


def _batch(folder: Path) -> Rows | None:
    """The answers of a batch with the prompts of its input, known by their `custom_id`."""
    files = sorted(path for path in folder.iterdir() if kind_of(path) == ".jsonl")
    rows = [(number, row) for path in files for number, row in read_rows(path) if "custom_id" in row]
    asked = {row["custom_id"]: row["body"]["messages"] for _, row in rows if "messages" in (row.get("body") or {})}
    answers = [(number, row) for number, row in rows if "response" in row]
    if not answers:
        return None

    def pairs(row: Row) -> _Pairs:
        body = (row["response"] or {}).get("body") or {}
        choices = body.get("choices") or [{"message": {"content": None}}]
        return [_pair(row["custom_id"], asked[row["custom_id"]], choices[0]["message"]["content"], "batch")]

    return _numbered(folder, answers, pairs)
