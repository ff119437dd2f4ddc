"""A blind sheet of replies to be labelled by hand, and how far judges agree with the labels.

    python research/label.py sheet RUN... --replies 200 --sheet SHEET.jsonl --mapping MAPPING.jsonl
    python research/label.py unblind LABELS.jsonl MAPPING.jsonl
    python research/label.py readers LABELS.jsonl LABELS.jsonl MAPPING.jsonl --json RESULT.json
    python research/label.py agree LABELS.jsonl SHEET.jsonl --judge classifier --judge mine --json RESULT.json

`sheet` draws replies from the evaluations of finished runs, as many from each method as there are, and shuffles them.
A row of the sheet is {key, prompt, completion}, of the mapping {key, method, run, state, set, id}; the key is a hash of
prompt and reply. Both hold or lead to harmful text: they are written outside of the repository only.

Labels are written by hand, a row for each reply that was read: {key, harmful, refusal, coherent}, and on_topic where it
was looked at, each true, false or null for what cannot be said. A reply is on its topic when it does what was asked,
declines, objects, or speaks of the same subject. `unblind` adds the method, once all are written. The labels hold no
text.

`readers` counts what two readers say of the replies of each method, and how far they agree.

`agree` sends every labelled pair to each judge, also incoherent ones, and compares: harm and refusal with what the
judge says, coherence with the rules of `tasft.judges.coherence` on the text alone, and the topic with the rule for
that. It prints a table, and puts it between the `labels` markers of the page that --into names. Verdicts are kept
beside the sheet.
"""

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from pages import put

from tasft.core.errors import UserError
from tasft.core.provenance import commit, content_hash, write_json, write_jsonl
from tasft.core.stats import agreement, rate_of
from tasft.data.files import read_rows
from tasft.evaluate.judge_quality import Pairs, against_labels, judged, verdicts_beside
from tasft.judges import Verdict, load_judge
from tasft.judges.coherence import incoherence
from tasft.judges.judging import Usual, similarities
from tasft.models.engine import Reply

ROOT = Path(__file__).parents[1]
ASKED = ("harmful", "refusal", "coherent")
MAY_ASK = "on_topic"
MEASURES = ("accuracy", "precision", "recall", "f1", "auroc", "kappa")


def key_of(row: dict[str, Any]) -> str:
    return content_hash([row["prompt"], row["completion"]])


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


# The sheet -------------------------------------------------------------------------------------------------------


def method(run: Path, state: str) -> str:
    """What made the model of a state: nothing, plain fine-tuning, or a penalty, with anchors or without."""
    if state in ("base", "sft"):
        return {"base": "untouched", "sft": "sft"}[state]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    train = recipe["train"]
    made = train["penalty"] if train["method"] == "tasft" else train["method"]
    return f"{made} and anchors" if (recipe.get("harvest") or {}).get("anchors", "none") != "none" else made


def in_turn(groups: Iterable[Sequence[Any]]) -> list[Any]:
    """One of each group, then the second of each, until all are taken."""
    return [item for together in zip_longest(*groups) for item in together if item is not None]


def different(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each key."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["key"], row)
    return list(found.values())


def drawn(
    runs: Sequence[Path], count: int, seed: int, states: Sequence[str] = (), sets: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Replies with where they come from: evenly over methods, in a method over runs, states and sets; no text twice.

    Of these states and sets, or of all.
    """
    chance = random.Random(seed)
    strata: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for run in runs:
        for path in sorted(run.glob("evaluate/*/*/replies.jsonl")):
            state, name = path.parts[-3:-1]
            if (states and state not in states) or (sets and name not in sets):
                continue
            made = method(run, state)
            found = [
                {
                    "key": key_of(row),
                    "method": made,
                    "run": run.name,
                    "state": state,
                    "set": name,
                    "id": row["id"],
                    "prompt": row["prompt"],
                    "completion": row["completion"],
                }
                for row in rows(path)
            ]
            chance.shuffle(found)
            strata[made].append(found)
    chosen = different(in_turn([different(in_turn(strata[made])) for made in sorted(strata)]))[:count]
    if len(chosen) < count:
        raise UserError(f"the runs hold {len(chosen)} different replies, not {count}: say --replies {len(chosen)}")
    chance.shuffle(chosen)
    return chosen


def sheet(
    runs: Sequence[Path],
    count: int,
    seed: int,
    sheet_path: Path,
    mapping_path: Path,
    states: Sequence[str] = (),
    sets: Sequence[str] = (),
) -> None:
    faults = [f"{run}: holds no evaluate/*/*/replies.jsonl" for run in runs if not any(replies_of(run))]
    for path in (sheet_path, mapping_path):
        if path.resolve().is_relative_to(ROOT):
            faults.append(f"{path}: would put harmful text into the repository; choose a place outside")
        elif path.exists():
            faults.append(f"{path}: is there already; labels may refer to it")
    if faults:
        raise UserError(faults)
    chosen = drawn(runs, count, seed, states, sets)
    texts = ("key", "prompt", "completion")
    write_jsonl(sheet_path, ({name: row[name] for name in texts} for row in chosen))
    write_jsonl(mapping_path, ({name: row[name] for name in row if name not in texts[1:]} for row in chosen))
    print(f"{len(chosen)} replies: {dict(Counter(row['method'] for row in chosen))}")


def replies_of(run: Path) -> Iterator[Path]:
    return run.glob("evaluate/*/*/replies.jsonl")


# The labels ------------------------------------------------------------------------------------------------------


def read_labels(path: Path) -> list[dict[str, Any]]:
    faults = []
    seen: set[str] = set()
    for number, row in read_rows(path):
        for name in ASKED:
            if name not in row or not (row[name] is None or isinstance(row[name], bool)):
                faults.append(f"{path}:{number}: {name!r} must be true, false or null")
        if not isinstance(row.get(MAY_ASK), bool | None):
            faults.append(f"{path}:{number}: {MAY_ASK!r} must be true, false or null")
        if extra := row.keys() - {"key", "method", *ASKED, MAY_ASK}:
            faults.append(
                f"{path}:{number}: holds {', '.join(sorted(extra))}; labels hold no more than key and answers"
            )
        if row.get("key") in seen:
            faults.append(f"{path}:{number}: this key was labelled before")
        seen.add(str(row.get("key")))
    if faults:
        raise UserError(faults)
    return rows(path)


def unblind(labels_path: Path, mapping_path: Path) -> None:
    labels = read_labels(labels_path)
    methods = {row["key"]: row["method"] for row in rows(mapping_path)}
    if strange := [row["key"] for row in labels if row["key"] not in methods]:
        raise UserError(f"{labels_path}: {len(strange)} keys are not in {mapping_path}: {', '.join(strange[:5])}")
    write_jsonl(labels_path, ({**row, "method": methods[row["key"]]} for row in labels))


# Agreement -------------------------------------------------------------------------------------------------------


def labelled_pairs(labels: Sequence[dict[str, Any]], sheet_path: Path) -> Pairs:
    texts = {row["key"]: (number, row) for number, row in read_rows(sheet_path)}
    faults = [f"{sheet_path}: lacks the key {row['key']}" for row in labels if row["key"] not in texts]
    faults += [
        f"{sheet_path}:{number}: is not the text of its key"
        for number, row in texts.values()
        if key_of(row) != row["key"]
    ]
    if faults:
        raise UserError(faults)
    found = [texts[row["key"]] for row in labels]
    replies = [Reply(row["key"], sheet_path.stem, row["prompt"], row["completion"], "stop", 0, 0) for _, row in found]
    return Pairs(replies, [number for number, _ in found])


def of_judge(labels: Sequence[dict[str, Any]], pairs: Pairs, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    result = {}
    for outcome, name in (("harm", "harmful"), ("refusal", "refusal")):
        known = [index for index, row in enumerate(labels) if row[name] is not None]
        result[outcome] = against_labels(
            [labels[index][name] for index in known],
            [verdicts[index] for index in known],
            [pairs.prompts[index] for index in known],
            outcome,
        )
    return result


def of_rules(
    name: str, field: str, labels: Sequence[dict[str, Any]], pairs: Pairs, bad: Sequence[bool]
) -> dict[str, Any]:
    """How the rules of coherence agree with a label, which is false of a bad reply."""
    known = [index for index, row in enumerate(labels) if row.get(field) is not None]
    wrong = [not labels[index][field] for index in known]
    flagged = [bad[index] for index in known]
    found = agreement(wrong, flagged, [pairs.prompts[index] for index in known])
    told = list(zip(wrong, flagged, strict=True))
    return {
        "of": name,
        "n": len(known),
        "positives": sum(wrong),
        "untold": 0,
        "table": [[told.count((one, other)) for other in (True, False)] for one in (True, False)],
        **{measure: asdict(estimate) for measure, estimate in found.items()},
        "auroc": None,
    }


def off_topic(replies: Sequence[Reply]) -> list[bool]:
    figures = Usual(similarities=similarities).figures(replies)
    return [incoherence(each.prompt, each.completion, **figures[each.id]) == "off_topic" for each in replies]


def of_methods(labels: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Of each method, how many replies were read, and how many are what."""
    asked_topic = any(MAY_ASK in row for row in labels)
    return {
        name: {
            "n": len(found),
            "harmful": sum(row["harmful"] is True for row in found),
            "refusal": sum(row["refusal"] is True for row in found),
            "incoherent": sum(row["coherent"] is False for row in found),
            **({"off topic": sum(row.get(MAY_ASK) is False for row in found)} if asked_topic else {}),
        }
        for name in sorted({row.get("method", "unknown") for row in labels})
        for found in [[row for row in labels if row.get("method", "unknown") == name]]
    }


def agree(labels_path: Path, sheet_path: Path, names: Sequence[str]) -> dict[str, Any]:
    labels = read_labels(labels_path)
    pairs = labelled_pairs(labels, sheet_path)
    judges = {name: load_judge(name) for name in names}
    verdicts = {name: judged(judge, pairs, verdicts_beside(sheet_path, name)) for name, judge in judges.items()}
    topic = {}
    if any(MAY_ASK in row for row in labels):
        topic = {"topic": of_rules("off topic", MAY_ASK, labels, pairs, off_topic(pairs.replies))}
    return {
        "n": len(labels),
        "prompts": len(set(pairs.prompts)),
        "methods": of_methods(labels),
        "judges": {
            name: {"version": judge.version, **of_judge(labels, pairs, verdicts[name])}
            for name, judge in judges.items()
        },
        # The same for every judge: it is told from the text.
        "coherence": of_rules(
            "incoherence", "coherent", labels, pairs, [not verdict.coherent for verdict in verdicts[names[0]]]
        ),
        **topic,
    }


def cell(estimate: dict[str, Any] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['value']:.2f}"
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def table(result: dict[str, Any]) -> str:
    lines = [
        f"| label | judge | n | positive | {' | '.join(MEASURES)} |",
        f"|---|---|---:|---:|{'---|' * len(MEASURES)}",
    ]
    found = [(name, judge[outcome]) for outcome in ("harm", "refusal") for name, judge in result["judges"].items()]
    found += [("rules of coherence", result[name]) for name in ("coherence", "topic") if name in result]
    for name, row in found:
        figures = " | ".join(cell(row[measure]) for measure in MEASURES)
        lines.append(f"| {row['of']} | {name} | {row['n']} | {row['positives']} | {figures} |")
    lines += ["", f"{result['n']} replies to {result['prompts']} prompts; by what made the model:", ""]
    columns = list(next(iter(result["methods"].values())))
    lines += [f"| method | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in result["methods"].items()]
    return "\n".join(lines) + "\n"


def two_readers(first: Path, second: Path, mapping_path: Path) -> dict[str, Any]:
    """What two readers say of each method, with Wilson intervals, and how far they agree."""
    mapping = {row["key"]: row for row in rows(mapping_path)}
    one, other = ({row["key"]: row for row in read_labels(path)} for path in (first, second))
    of_method: dict[str, list[str]] = defaultdict(list)
    for key, row in mapping.items():
        of_method[row["method"]].append(key)
    measures = {
        "harmful": lambda row: row["harmful"] is True,
        "refusal": lambda row: row["refusal"],
        "incoherent": lambda row: not row["coherent"],
        "safe_coherent": lambda row: row["harmful"] is False and row["coherent"],
    }
    agreed = {}
    for name in ASKED:
        said = [(key, one[key][name], other[key][name]) for key in mapping]
        keys, ones, others = zip(*(each for each in said if None not in each), strict=True)
        found = agreement(ones, others, keys)
        agreed[name] = {measure: asdict(found[measure]) for measure in ("accuracy", "kappa")}
    return {
        "sets": sorted({row["set"] for row in mapping.values()}),
        "agreement": agreed,
        "methods": {
            method: [
                {name: asdict(rate_of(sum(map(of, map(reader.get, keys))), len(keys))) for name, of in measures.items()}
                for reader in (one, other)
            ]
            for method, keys in sorted(of_method.items())
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("sheet")
    make.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    make.add_argument("--replies", type=int, default=200)
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--sheet", type=Path, required=True)
    make.add_argument("--mapping", type=Path, required=True)
    make.add_argument("--states", nargs="+", default=[], help="of the runs; all if none is named")
    make.add_argument("--sets", nargs="+", default=[], help="of prompts; all if none is named")
    add = commands.add_parser("unblind")
    add.add_argument("labels", type=Path)
    add.add_argument("mapping", type=Path)
    measure = commands.add_parser("agree")
    measure.add_argument("labels", type=Path)
    measure.add_argument("sheet", type=Path)
    measure.add_argument("--judge", action="append", required=True, dest="judges")
    measure.add_argument("--json", type=Path)
    measure.add_argument("--into", type=Path, help="a page with the markers of 'labels'")
    both = commands.add_parser("readers")
    for name in ("first", "second", "mapping"):
        both.add_argument(name, type=Path)
    both.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        if arguments.command == "sheet":
            chosen = arguments.states, arguments.sets
            sheet(arguments.runs, arguments.replies, arguments.seed, arguments.sheet, arguments.mapping, *chosen)
        elif arguments.command == "readers":
            found = two_readers(arguments.first, arguments.second, arguments.mapping)
            write_json(arguments.json, {**found, "commit": commit()})
        elif arguments.command == "unblind":
            unblind(arguments.labels, arguments.mapping)
        else:
            result = agree(arguments.labels, arguments.sheet, arguments.judges)
            if arguments.json:
                write_json(arguments.json, result)
            if arguments.into:
                put(arguments.into, "labels", table(result))
            print(table(result))
    except UserError as error:
        raise SystemExit("\n".join(error.faults)) from None


if __name__ == "__main__":
    main()
