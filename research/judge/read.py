"""Sheets for readers, and the labels of what they read.

    python research/judge/read.py sheets REPLIES SHEETS KEYS [--count 100] [--least 60]
    python research/judge/read.py settle REPLIES SHEETS KEYS --to labels.jsonl [--settled settled.json]

REPLIES is the folder that make_replies.py wrote. `sheets` puts what is on no sheet yet into SHEETS, shuffled and
without the model, and keeps the hashes of each sheet in KEYS, out of the readers' sight; replies of the test part go on
sheets called double-*, which two readers read. docs/labelling.md says what they write beside a sheet. `settle` writes
labels without text, and agreement.json beside them; labels of other sheets stay. Where readers differ on anything,
`settled.json` must say {key: label}; else the first reader's word is kept and counted as not settled.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from public import key_of

QUESTIONS = {
    "harmful": ("no", "yes", "unsure"),
    "refusal": ("none", "partial", "full"),
    "rambling": ("no", "yes"),
    "broken": ("no", "yes"),
}

Label = Mapping[str, str]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def replies(folder: Path) -> dict[str, dict[str, Any]]:
    """Replies by key, of all cells that are there."""
    return {row["key"]: row for path in sorted(folder.glob("*.jsonl")) for row in lines(path)}


def write_sheets(folder: Path, sheets: Path, keys: Path, count: int, least: int) -> None:
    """Sheets of `count` replies; what is left over gets one too if it is at least `least` replies."""
    texts = replies(folder)
    taken = {key for path in keys.glob("*.json") for key in json.loads(path.read_text("utf-8"))}
    for kind, part in (("double", "test"), ("single", "train")):
        left = sorted(key for key, row in texts.items() if row["part"] == part and key not in taken)
        random.Random(len(taken)).shuffle(left)
        for start in range(0, len(left), count):
            some = left[start : start + count]
            if len(some) < least:
                continue
            name = f"{kind}-{len(list(keys.glob(f'{kind}-*.json'))) + 1:02}"
            (keys / f"{name}.json").write_text(json.dumps(some), "utf-8")
            rows = [
                {"n": number, "prompt": texts[key]["prompt"], "reply": texts[key]["completion"]}
                for number, key in enumerate(some, 1)
            ]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            hidden = sheets / f".{name}"
            hidden.write_text(text, "utf-8")
            hidden.rename(sheets / f"{name}.jsonl")  # Readers watch the folder.
            print(name, len(some))


def label_of(row: Mapping[str, Any], where: str) -> Label:
    """The four answers of a reader's line.

    Raises:
        SystemExit: One is missing or none of those that there are.
    """
    for name, known in QUESTIONS.items():
        if row.get(name) not in known:
            raise SystemExit(f"{where}: {name} is {row.get(name)!r}; it is one of {', '.join(known)}")
    return {name: row[name] for name in QUESTIONS}


def read_labels(sheets: Path, keys: Path) -> Iterator[tuple[str, str, Label]]:
    """(key, reader, label) of all sheets that were read."""
    for path in sorted(sheets.glob("*-[AB].jsonl")):
        name, _, reader = path.stem.rpartition("-")
        of_sheet = json.loads((keys / f"{name}.json").read_text("utf-8"))
        rows = {row["n"]: row for row in lines(path)}
        if missing := [number for number in range(1, len(of_sheet) + 1) if number not in rows]:
            print(f"{path}: {len(missing)} lines are missing, from {missing[0]} on")
        for number, key in enumerate(of_sheet, 1):
            if number in rows:
                yield key, reader, label_of(rows[number], f"{path}:{number}")


def agreement(first: Sequence[Label], second: Sequence[Label]) -> dict[str, Any]:
    """Of each question Cohen's kappa (1960), how often readers differ; refusal also as yes or no."""
    from sklearn.metrics import cohen_kappa_score  # Slow to import, and sheets need none.

    views = {name: lambda label, name=name: label[name] for name in QUESTIONS}
    views["declines"] = lambda label: label["refusal"] != "none"
    result: dict[str, Any] = {"replies": len(first)}
    for name, of in views.items():
        ones, others = [of(label) for label in first], [of(label) for label in second]
        kappa = cohen_kappa_score(ones, others)
        result[name] = {
            "kappa": None if kappa != kappa else float(kappa),
            "differ": sum(one != other for one, other in zip(ones, others, strict=True)),
        }
    return result


def settle(
    folder: Path, sheets: Path, keys: Path, settled: Mapping[str, Label], to: Path, agreed: str = "agreement.json"
) -> None:
    """Writes the labels, beside those of other sheets that are there, and how far the readers agree.

    Prints what is not settled.
    """
    texts, labels = replies(folder), {}
    for key, reader, label in read_labels(sheets, keys):
        labels.setdefault(key, {})[reader] = label
    rows, open_ones = [], []
    earlier = {row["key"]: row for row in (lines(to) if to.exists() else [])}
    for key, of_reply in sorted(labels.items()):
        text = texts[key]
        if key in earlier and earlier[key]["cell"] != text["cell"]:
            continue  # Another model said the same, and was read before.
        earlier.pop(key, None)
        row = {"key": key, "prompt": key_of(text["prompt"], "")}
        row |= {name: text[name] for name in ("part", "cell", "kind", "temperature")}
        label = settled.get(key) or of_reply.get("A") or of_reply["B"]
        row |= label_of(label, key) | {"readers": len(of_reply)}
        if len({json.dumps(answer, sort_keys=True) for answer in of_reply.values()}) > 1:
            row |= {"first": of_reply["A"], "second": of_reply["B"], "settled": key in settled}
            if key not in settled:
                open_ones.append(key)
        rows.append(row)
    rows = sorted([*rows, *earlier.values()], key=lambda row: row["key"])
    to.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    both = [pair for pair in labels.values() if len(pair) == 2]
    figures = agreement([pair["A"] for pair in both], [pair["B"] for pair in both]) if both else {"replies": 0}
    (to.parent / agreed).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    print(len(rows), "labels;", json.dumps(figures))
    for key in open_ones:
        print(json.dumps({"key": key, "A": list(labels[key]["A"].values()), "B": list(labels[key]["B"].values())}))
        print("  ", " ".join(texts[key]["prompt"].split())[:200], ">>", texts[key]["completion"].replace("\n", "/"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("sheets", "settle"))
    parser.add_argument("replies", type=Path)
    parser.add_argument("sheets", type=Path)
    parser.add_argument("keys", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--least", type=int, default=60)
    parser.add_argument("--settled", type=Path, help="key -> label, of replies that readers differ on")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--agreed", default="agreement.json", help="beside --to")
    asked = parser.parse_args()
    if asked.command == "sheets":
        asked.keys.mkdir(parents=True, exist_ok=True)
        write_sheets(asked.replies, asked.sheets, asked.keys, asked.count, asked.least)
    else:
        settled = json.loads(asked.settled.read_text("utf-8")) if asked.settled else {}
        settle(asked.replies, asked.sheets, asked.keys, settled, asked.to, asked.agreed)


if __name__ == "__main__":
    main()
