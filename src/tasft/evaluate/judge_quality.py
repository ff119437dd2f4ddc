"""How far a judge can be trusted: what it says of the pairs in a file, beside labels or another judge."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from tasft.core.errors import UserError
from tasft.core.provenance import atomic_write_text, write_json
from tasft.core.stats import agreement, auroc
from tasft.core.text import csv_text
from tasft.data.cells import text_of
from tasft.data.files import read_rows
from tasft.data.logs import read_log
from tasft.data.rows import repeated_ids
from tasft.evaluate.safety import summarise
from tasft.judges import Judge, JudgeSettings, Pair, Verdict, load_judge
from tasft.judges.judging import judge_replies, key_of
from tasft.models.engine import Reply

T = TypeVar("T")
Outcome = Literal["harm", "refusal"]

# What other data sets call the two columns.
_PROMPTS = ("prompt", "instruction", "question", "query", "goal", "behavior", "user", "input")
_REPLIES = ("completion", "response", "reply", "output", "answer", "generation", "assistant")
_YES, _NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}
YES_NO = {"harm": ("harmful", "safe"), "refusal": ("refusal", "compliance")}
_FIELDS = {"harm": "harmful", "refusal": "refusal"}
_SHOWN = 20  # Characters of a label that cannot be read.


@dataclass(frozen=True)
class Pairs:
    """Prompts with their replies, as a file has them.

    Attributes:
        replies: The pairs.
        lines: The number of each, see `read_rows`.
        labels: What people say of each; None when they were not asked for.
    """

    replies: list[Reply]
    lines: list[int]
    labels: list[bool] | None = None

    @property
    def prompts(self) -> list[str]:
        """The prompt of each pair: replies to the same one are not independent."""
        return [reply.prompt for reply in self.replies]


def attempt(faults: list[str], step: Callable[[], T]) -> T | None:
    """What a step gives; None if the user has to see to something, which is added to the faults."""
    try:
        return step()
    except UserError as error:
        faults += error.faults
        return None


# Pairs -----------------------------------------------------------------------------------------------------------


def read_pairs(
    path: Path,
    prompt_column: str = "prompt",
    reply_column: str = "completion",
    label_column: str | None = None,
    label_of: Outcome = "harm",
) -> Pairs:
    """Pairs of a JSONL, JSON or CSV file; an id is what the column `id` says, where it says nothing the row's number.

    Args:
        path: The file.
        prompt_column: What was asked; text.
        reply_column: What was answered; text, which may be empty.
        label_column: 0 or 1, true or false, yes or no, or in words; none is read by default.
        label_of: Words are harmful or safe, or refusal or compliance.

    Raises:
        UserError: Names every fault of the file, and shows neither a prompt nor a reply.
    """
    rows = read_log(path) or read_rows(path)
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    wanted = (("--prompt-column", prompt_column, _PROMPTS), ("--reply-column", reply_column, _REPLIES))
    faults = [
        _no_column(path, option, column, columns, usual)
        for option, column, usual in (*wanted, ("--labels", label_column, ()))
        if column is not None and column not in columns
    ]
    if faults:
        raise UserError(faults)
    pairs = []
    labels = []
    for number, row in rows:
        for column, empty in ((prompt_column, False), (reply_column, True)):
            if fault := _fault_of_text(row, column, empty):
                faults.append(f"{path}:{number}: {fault}")
        if label_column is not None:
            label = _label(row.get(label_column), label_of)
            if label is None:
                faults.append(f"{path}:{number}: {_bad_label(row, label_column, label_of)}")
            labels.append(bool(label))
        name = text_of(row.get("id")) or str(number)
        prompt, reply = (str(row.get(column)) for column in (prompt_column, reply_column))
        pairs.append((number, Reply(name, path.stem, prompt, reply, "stop", 0, 0)))
    faults += repeated_ids(path, ((number, pair.id) for number, pair in pairs))
    if faults:
        raise UserError(faults)
    lines = [number for number, _ in pairs]
    return Pairs([pair for _, pair in pairs], lines, None if label_column is None else labels)


def _no_column(path: Path, option: str, column: str, columns: Sequence[str], usual: Sequence[str]) -> str:
    known = {name.strip().lower(): name for name in reversed(columns)}
    likely = next((known[name] for name in usual if name in known), None)
    hint = f"; say {option} {likely}" if likely is not None else f"; name one with {option}"
    return f"{path}: no column is called {column!r}; there are {', '.join(f'{name!r:.40}' for name in columns)}{hint}"


def _fault_of_text(row: Mapping[str, Any], column: str, empty: bool) -> str | None:
    value = row.get(column)
    if column not in row:
        return f"{column!r} is missing"
    if not isinstance(value, str):
        return f"{column!r} must be text, found {type(value).__name__}"
    return None if empty or value.strip() else f"{column!r} is empty"


def _label(value: object, label_of: Outcome) -> bool | None:
    word = str(value).strip().lower()
    yes, no = YES_NO[label_of]
    return True if word in {*_YES, yes} else False if word in {*_NO, no} else None


def _bad_label(row: Mapping[str, Any], column: str, label_of: Outcome) -> str:
    if column not in row:
        return f"{column!r} is missing"
    shown = repr(row[column])
    if len(shown) > _SHOWN + 2:  # May be a reply, if the column is not the one that was meant.
        shown = f"{type(row[column]).__name__} of {len(str(row[column]))} characters"
    return f"{column!r} is {shown}; use 0 or 1, true or false, yes or no, {' or '.join(YES_NO[label_of])}"


# Verdicts --------------------------------------------------------------------------------------------------------


def verdicts_beside(path: Path, judge: str) -> Path:
    """Where the verdicts on a file go unless the user says otherwise."""
    return path.with_name(f"{path.name}.{judge}.jsonl")


def check_verdicts(path: Path, judge: str | None = None) -> None:
    """Refuse a file that holds anything but verdicts, maybe cut short: it would be lost.

    Args:
        path: It need not be there.
        judge: Whose verdicts they must be; None for anybody's.

    Raises:
        UserError: It holds something else.
    """
    if not path.exists():
        return
    refused = UserError(f"{path}: holds something else than verdicts; choose another file with --out")
    if not path.is_file():
        raise refused
    *lines, last = path.read_bytes().split(b"\n")
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:
        raise refused from None
    if not all(map(_is_verdict, rows)):
        raise refused
    if not rows and last and not last.startswith(b'{"id": '):
        raise refused
    if others := sorted({row["judge"] for row in rows} - {judge}) if judge else []:
        raise UserError(f"{path}: holds verdicts of {', '.join(others)}; choose another file with --out")


def _is_verdict(row: Any) -> bool:
    needed = {field.name for field in fields(Verdict) if field.default is MISSING}
    if not isinstance(row, dict) or not needed <= row.keys() <= {field.name for field in fields(Verdict)}:
        return False
    row = asdict(Verdict(**row))
    kinds: dict[Any, Sequence[str]] = {
        str: ("id", "judge", "reason", "key"),
        bool | None: ("harmful", "refusal", "coherent", "partial", "on_topic", "undecided", "broken"),
        int | float | None: ("score",),
    }
    return all(isinstance(row[name], kind) for kind, names in kinds.items() for name in names)


def judged(judge: Judge, pairs: Pairs, path: Path) -> list[Verdict]:
    """What a judge says of every pair, also of incoherent replies; coherence, told by the text alone, is beside it.

    Verdicts are appended to the file as they come; those that it holds already are not asked for again.

    Raises:
        UserError: The judge cannot work.
    """
    return judge_replies(judge, pairs.replies, path, every=True)


def saved(path: Path, pairs: Pairs) -> list[Verdict]:
    """Verdicts on the pairs from a file that a run or `tasft judge` wrote, known by their texts whatever the ids.

    Raises:
        UserError: It holds something else, or lacks pairs.
    """
    check_verdicts(path)
    known = {verdict.key.rpartition("-")[2]: verdict for verdict in (Verdict(**row) for _, row in read_rows(path))}
    found = [(reply.id, known.get(key_of(reply.prompt, reply.completion))) for reply in pairs.replies]
    if missing := [name for name, verdict in found if verdict is None]:
        some = ", ".join(f"{name!r:.40}" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{path}: holds no verdict on {len(missing)} of {len(found)} pairs: {some}; have the file judged again"
        )
    return [replace(verdict, id=name) for name, verdict in found if verdict]


def rates(verdicts: Sequence[Verdict], pairs: Pairs) -> dict[str, Any]:
    """Rates as the summary of an evaluation has them: there an incoherent reply is sent to no judge."""
    harmful, refusal, partial = (
        False if any(getattr(verdict, field) is not None for verdict in verdicts) else None
        for field in ("harmful", "refusal", "partial")
    )
    counted = [
        verdict
        if verdict.coherent
        else replace(
            verdict,
            harmful=harmful,
            refusal=refusal,
            partial=partial,
            score=None,
            reason=verdict.reason if verdict.has_cause else "",
        )
        for verdict in verdicts
    ]
    return summarise(counted, pairs.replies)


# Agreement -------------------------------------------------------------------------------------------------------


def says(verdict: Verdict, outcome: Outcome) -> bool | None:
    """What a verdict tells of harm or refusal."""
    value: bool | None = getattr(verdict, _FIELDS[outcome])
    return value


def against_labels(
    labels: Sequence[bool], verdicts: Sequence[Verdict], prompts: Sequence[str], outcome: Outcome
) -> dict[str, Any]:
    """How a judge's verdicts agree with labels: agreement, the four counts, `auroc` and `curve` where there are scores.

    Verdicts that do not tell are left out, and counted in `untold`.
    """
    rows = list(zip(labels, verdicts, prompts, strict=True))
    known = [
        (label, predicted, prompt)
        for label, verdict, prompt in rows
        if (predicted := says(verdict, outcome)) is not None
    ]
    scored = [
        (label, verdict.score, prompt)
        for label, verdict, prompt in rows
        if outcome == "harm" and verdict.score is not None
    ]
    return {
        "of": outcome,
        "n": len(known),
        "positives": sum(label for label, _, _ in known),
        "untold": len(rows) - len(known),
        "table": _table((label, predicted) for label, predicted, _ in known),
        **{name: asdict(estimate) for name, estimate in agreement(*_columns(known)).items()},
        "auroc": asdict(auroc(*_columns(scored))) if scored else None,
        "curve": curve([score for _, score, _ in scored], [label for label, _, _ in scored]),
    }


def curve(scores: Sequence[float], labels: Sequence[bool]) -> list[list[float]]:
    """[threshold, precision, recall, F1] for each score that there is: one of at least it is called harmful.

    Empty where there are no labels of both kinds.
    """
    values, wanted = np.asarray(scores), np.asarray(labels, dtype=bool)
    if len(set(labels)) < 2:
        return []
    order = np.argsort(-values, kind="stable")
    last = np.append(np.diff(values[order]) != 0, True)  # One point for each different score.
    hits, called = np.cumsum(wanted[order])[last], np.arange(1, len(values) + 1)[last]
    points = (values[order][last], hits / called, hits / wanted.sum(), 2 * hits / (called + wanted.sum()))
    return [[float(value) for value in point] for point in zip(*points, strict=True)]


def against_each_other(
    first: Sequence[Verdict], second: Sequence[Verdict], prompts: Sequence[str], outcome: Outcome
) -> dict[str, Any]:
    """How two judges agree: the share of equal verdicts, Cohen's kappa, the four counts.

    Pairs of which either does not tell are left out, and counted in `untold`.
    """
    rows = zip(first, second, prompts, strict=True)
    known = [
        (one, other, prompt)
        for a, b, prompt in rows
        if (one := says(a, outcome)) is not None and (other := says(b, outcome)) is not None
    ]
    estimates = agreement(*_columns(known))
    return {
        "of": outcome,
        "n": len(known),
        "untold": len(prompts) - len(known),
        "table": _table((one, other) for one, other, _ in known),
        "agreement": asdict(estimates["accuracy"]),
        "kappa": asdict(estimates["kappa"]),
    }


def _columns(rows: Sequence[tuple[bool, T, str]]) -> tuple[list[bool], list[T], list[str]]:
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _table(pairs: Iterable[tuple[bool, bool]]) -> list[list[int]]:
    """Counts: the first says yes, no down; the second yes, no across."""
    answers = list(pairs)
    return [[answers.count((one, other)) for other in (True, False)] for one in (True, False)]


def differences(
    pairs: Pairs, first: Sequence[bool | None], verdicts: Sequence[Verdict], outcome: Outcome, threshold: float | None
) -> list[dict[str, Any]]:
    """Where verdicts are not what somebody else says, those first in which the judge is surest.

    Args:
        pairs: What was judged.
        first: The other's word on each: labels, or another judge's.
        verdicts: The judge's.
        outcome: Of what.
        threshold: The judge's. Scores count by their distance from it; without, the order is that of the file.
    """
    ranked = []
    for index, (word, verdict) in enumerate(zip(first, verdicts, strict=True)):
        predicted = says(verdict, outcome)
        if word is None or predicted is None or word == predicted:
            continue
        sure = 0.0
        if outcome == "harm" and threshold is not None and verdict.score is not None:
            sure = abs(verdict.score - threshold)
        row = {"line": pairs.lines[index], "id": verdict.id, "of": outcome, "first": word, "second": predicted}
        ranked.append((sure, {**row, "score": verdict.score if outcome == "harm" else None}))
    ranked.sort(key=lambda entry: -entry[0])
    return [row for _, row in ranked]


# The command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """What `tasft judge --judge` writes; None is not written, but verdicts go beside the pairs.

    Attributes:
        verdicts: JSONL, a verdict on a line.
        table: CSV, a pair and its verdict on a line.
        fit: JSON, calibration and thresholds by labels, which recipes name.
    """

    verdicts: Path | None = None
    table: Path | None = None
    fit: Path | None = None


def score(
    path: Path, read: Callable[[], Pairs], settings: JudgeSettings, label_of: Outcome, outputs: Outputs, show: int
) -> dict[str, Any]:
    """What `tasft judge --judge` reports of a file.

    Args:
        path: The file.
        read: Gives its pairs.
        settings: The judge's.
        label_of: What labels say, if there are any.
        outputs: What is written.
        show: How many differences from the labels have their texts.

    Raises:
        UserError: Names all faults, of the pairs, of the judge and of outputs.
    """
    out = outputs.verdicts or verdicts_beside(path, settings.kind)
    faults: list[str] = []
    pairs = attempt(faults, read)
    judge = attempt(faults, lambda: load_judge(settings.kind, {settings.kind: settings}))
    attempt(faults, lambda: check_verdicts(out, settings.kind))
    if pairs is None or judge is None or faults:
        raise UserError(faults)
    if pairs.labels is not None and _FIELDS[label_of] not in judge.tells and (label_of == "refusal" or judge.tells):
        raise UserError(f"judge {judge.name}: it does not tell {label_of}; use another --label-of")
    verdicts = judged(judge, pairs, out)
    described = {"name": judge.name, "version": judge.version, "threshold": judge.threshold, "verdicts": str(out)}
    result = {"file": str(path), "pairs": len(verdicts), "judges": [{**described, **rates(verdicts, pairs)}]}
    if outputs.table:
        write_table(outputs.table, pairs, verdicts)
    if pairs.labels is None:
        return result
    differing = differences(pairs, pairs.labels, verdicts, label_of, judge.threshold)
    result["labels"] = against_labels(pairs.labels, verdicts, pairs.prompts, label_of)
    if outputs.fit:
        from tasft.judges.fitted import fit

        scores = [verdict.score for verdict in verdicts]
        fitted = fit(
            judge,
            settings.kind,
            [Pair(reply.id, reply.prompt, reply.completion) for reply in pairs.replies],
            scores,
            pairs.labels,
        )
        write_json(outputs.fit, fitted.model_dump())
        result["fit"] = {"file": str(outputs.fit), **fitted.model_dump()}
    return {**result, "differences": _with_texts(differing, pairs, show)}


def write_table(path: Path, pairs: Pairs, verdicts: Sequence[Verdict]) -> None:
    """A pair on each line, with what the judge says of it: undecided ones first, for a person to read."""
    names = ("harmful", "score", "refusal", "partial", "undecided", "coherent", "reason")
    rows = [
        {"line": line, "id": reply.id, "prompt": reply.prompt, "completion": reply.completion}
        | {name: getattr(verdict, name) for name in names}
        | ({} if pairs.labels is None else {"label": pairs.labels[index]})
        for index, (line, reply, verdict) in enumerate(zip(pairs.lines, pairs.replies, verdicts, strict=True))
    ]
    rows.sort(key=lambda row: not row["undecided"])
    atomic_write_text(path, csv_text([list(rows[0]), *(list(row.values()) for row in rows)]))


def compare(path: Path, read: Callable[[], Pairs], names: Sequence[str], show: int) -> dict[str, Any]:
    """What `tasft judge --compare` reports of a file.

    Args:
        path: The file.
        read: Gives its pairs.
        names: Two judges: each by name, or a file of its verdicts.
        show: How many differences have their texts.

    Raises:
        UserError: Names all faults, of the pairs and of both judges.
    """
    faults: list[str] = []
    pairs = attempt(faults, read)
    files, judges = [], []
    for name in names:
        is_file = Path(name).is_file()
        files.append(Path(name) if is_file else verdicts_beside(path, name))
        judges.append(None if is_file else attempt(faults, partial(load_judge, name)))
        attempt(faults, partial(check_verdicts, files[-1], None if is_file else name))
    if pairs is None or faults:
        raise UserError(faults)
    # Those that are there first: what they lack is said before the other judge begins.
    existing = [None if judge else saved(file, pairs) for judge, file in zip(judges, files, strict=True)]
    both = [
        judged(judge, pairs, file) if judge else verdicts or []
        for judge, file, verdicts in zip(judges, files, existing, strict=True)
    ]
    described = [
        {"name": name, "verdicts": str(file), **rates(verdicts, pairs)}
        for name, file, verdicts in zip(names, files, both, strict=True)
    ]
    first, second = both
    outcomes: list[Outcome] = ["harm", "refusal"]
    differing = [
        row
        for outcome in outcomes
        for row in differences(pairs, [says(verdict, outcome) for verdict in first], second, outcome, None)
    ]
    return {
        "file": str(path),
        "pairs": len(pairs.replies),
        "judges": described,
        "between": [against_each_other(first, second, pairs.prompts, outcome) for outcome in outcomes],
        "differences": _with_texts(differing, pairs, show),
    }


def _with_texts(rows: Sequence[dict[str, Any]], pairs: Pairs, show: int) -> list[dict[str, Any]]:
    texts = {reply.id: {"prompt": reply.prompt, "completion": reply.completion} for reply in pairs.replies}
    return [{**row, **texts[row["id"]]} for row in rows[:show]] + list(rows[show:])
