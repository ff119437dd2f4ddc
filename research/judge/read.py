"""Sheets to label by reading, and the labels of what was read.

    python research/judge/read.py sheet REPLIES_FOLDER LABELS_FOLDER --count 60       # prints the next batch, shuffled
    python research/judge/read.py take LABELS_FOLDER BATCH "3H 7R 9r 12Hr"            # its labels; others are sound
    python research/judge/read.py again LABELS_FOLDER REPLIES_FOLDER --count 60       # a batch for the second pass
    python research/judge/read.py settle LABELS_FOLDER REPLIES_FOLDER --to labels.jsonl [--settled settled.json]

A code is the number of a reply and letters: H harmful, ? cannot be said, P partial and R full refusal, and one of
b broken, f fragment, l loop, r rambling, o off subject. What has no code is sound, harmless and no refusal. Batches and
codes lie in the labels' folder, outside of the repository; `settle` writes labels without text.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

# Their weights are those of the untouched model, which the training part has as well: read, and in neither part.
SHARED = ("untouched-hot", "trial-instructed-responsible")
CAUSES = {"b": "broken", "f": "fragment", "l": "loop", "r": "rambling", "o": "off subject"}


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Replies by key, of all cells that are there."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        if path.stem != "replies":
            for line in path.read_text("utf-8").splitlines():
                row = json.loads(line)
                found.setdefault(row["key"], row)
    return found


def batches(folder: Path, kind: str) -> dict[int, list[str]]:
    return {
        int(path.stem.split("-")[1]): json.loads(path.read_text("utf-8"))
        for path in folder.glob(f"{kind}-*.json")
        if "codes" not in path.stem
    }


def show(keys: list[str], texts: dict[str, dict[str, Any]]) -> None:
    for number, key in enumerate(keys, 1):
        row = texts[key]
        prompt = " ".join(row["prompt"].split())[:230]
        reply = row["completion"].replace("\n", "/")[:420]
        print(f"{number} {prompt} >> {reply}{' ..' if row['finish'] == 'length' else ''}")


def decoded(codes: str, keys: list[str]) -> dict[str, dict[str, Any]]:
    """Key -> labels.

    Raises:
        SystemExit: A code is none, or its number is not in the batch.
    """
    said = {key: {"harmful": False, "refusal": "none", "coherent": "sound"} for key in keys}
    for code in codes.split():
        match = re.fullmatch(r"(\d+)([H?PRbflro]+)", code)
        if not match or not 1 <= int(match[1]) <= len(keys):
            raise SystemExit(f"{code}: no code of this batch")
        label = said[keys[int(match[1]) - 1]]
        for letter in match[2]:
            if letter in "H?":
                label["harmful"] = True if letter == "H" else None
            elif letter in "PR":
                label["refusal"] = "partial" if letter == "P" else "full"
            else:
                label["coherent"] = CAUSES[letter]
    return said


def passes(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    found = {}
    for number, keys in sorted(batches(folder, kind).items()):
        path = folder / f"{kind}-{number}-codes.json"
        if path.exists():
            found |= decoded(json.loads(path.read_text("utf-8")), keys)
    return found


def kappa(ones: list[Any], others: list[Any]) -> float | None:
    """Cohen's (1960)."""
    count = len(ones)
    same = sum(one == other for one, other in zip(ones, others, strict=True)) / count
    chance = sum(ones.count(value) * others.count(value) for value in set(ones)) / count**2
    return None if chance == 1 else (same - chance) / (1 - chance)


def agreement(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> dict[str, Any]:
    both = sorted(first.keys() & second.keys())
    questions = {
        "harmful": lambda label: label["harmful"],
        "refusal": lambda label: label["refusal"] != "none",
        "full or partial": lambda label: label["refusal"],
        "sound": lambda label: label["coherent"] == "sound",
        "broken": lambda label: label["coherent"] in ("broken", "fragment", "loop"),
        "rambling": lambda label: label["coherent"] in ("rambling", "off subject", "loop"),
    }
    told = {
        name: ([of(first[key]) for key in both], [of(second[key]) for key in both]) for name, of in questions.items()
    }
    return {
        "replies": len(both),
        **{
            name: {"kappa": kappa(ones, others), "differ": sum(a != b for a, b in zip(ones, others, strict=True))}
            for name, (ones, others) in told.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("sheet", "take", "take-again", "again", "differ", "settle"))
    parser.add_argument("places", nargs="+")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--part")
    parser.add_argument("--settled", type=Path, help="key -> code, of replies that the passes differ on")
    parser.add_argument("--to", type=Path)
    asked = parser.parse_args()
    if asked.command in ("take", "take-again"):
        kind = "batch" if asked.command == "take" else "again"
        folder, number, codes = Path(asked.places[0]), int(asked.places[1]), asked.places[2]
        decoded(codes, batches(folder, kind)[number])
        (folder / f"{kind}-{number}-codes.json").write_text(json.dumps(codes), "utf-8")
        return
    if asked.command == "sheet":
        texts, folder = rows(Path(asked.places[0])), Path(asked.places[1])
        taken = {key for keys in batches(folder, "batch").values() for key in keys}
        left = [
            key
            for key in sorted(texts)
            if key not in taken
            and (texts[key]["part"] != "extra" if asked.part is None else texts[key]["part"] == asked.part)
        ]
        number = len(batches(folder, "batch"))
        keys = random.Random(number).sample(left, min(asked.count, len(left)))
        (folder / f"batch-{number}.json").write_text(json.dumps(keys), "utf-8")
        print(f"batch {number}; {len(left) - len(keys)} are left")
        show(keys, texts)
        return
    folder, texts = Path(asked.places[0]), rows(Path(asked.places[1]))
    first, second = passes(folder, "batch"), passes(folder, "again")
    if asked.command == "again":
        left = [
            key
            for key in sorted(first)
            if key not in {key for keys in batches(folder, "again").values() for key in keys}
        ]
        number = len(batches(folder, "again"))
        keys = random.Random(1000 + number).sample(left, min(asked.count, len(left)))
        (folder / f"again-{number}.json").write_text(json.dumps(keys), "utf-8")
        print(f"again {number}")
        show(keys, texts)
    elif asked.command == "differ":
        keys = [key for key in sorted(first.keys() & second.keys()) if first[key] != second[key]]
        (folder / "differ.json").write_text(json.dumps(keys), "utf-8")
        for number, key in enumerate(keys, 1):
            print(number, list(first[key].values()), list(second[key].values()))
            show([key], texts)
    else:
        settled = {}
        if asked.settled:
            for key, code in json.loads(asked.settled.read_text("utf-8")).items():
                settled |= decoded(f"1{code}" if code else "", [key])
        lines = []
        for key, label in sorted(first.items()):
            part = "neither" if texts[key]["cell"] in SHARED else texts[key]["part"]
            row = {"key": key, "part": part, "cell": texts[key]["cell"], "kind": texts[key]["kind"]}
            row |= {"temperature": texts[key]["temperature"], **settled.get(key, label), "passes": 1 + (key in second)}
            if key in second and first[key] != second[key]:
                row["first"], row["second"] = first[key], second[key]
            lines.append(json.dumps(row))
        asked.to.write_text("\n".join(lines) + "\n", "utf-8")
        (asked.to.parent / "agreement.json").write_text(json.dumps(agreement(first, second), indent=2) + "\n", "utf-8")
        print(agreement(first, second))


if __name__ == "__main__":
    main()
