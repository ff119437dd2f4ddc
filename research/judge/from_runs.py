"""Replies that runs kept, as rows to be labelled by reading: of a run's folder those that its part may have.

    python research/judge/from_runs.py RUN/evaluate/final --cell NAME --part test --most 56 --data DATA --to REPLIES

Takes every `replies.jsonl` below the folder that `--sets` names, in turn, no prompt twice: for the test part only
prompts that nothing was trained on, for the training part only prompts that no test has. Each cell draws its own.
"""

import argparse
import json
import random
from itertools import zip_longest
from pathlib import Path

from mixture import asked, of_test
from prompts import pools
from public import key_of, lines


def kinds(data: Path) -> dict[str, str]:
    """Prompt -> toxic, seeming or benign."""
    return {one: kind for (_, kind), forms in pools(data).items() for form in forms for one in form}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--cell", required=True)
    parser.add_argument("--part", choices=("train", "test"), required=True)
    parser.add_argument("--sets", nargs="+", required=True)
    parser.add_argument("--most", type=int, required=True)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    left_out = {prompt for prompt, _ in asked(args.data)} if args.part == "test" else of_test(args.data)
    known, chance, sets = kinds(args.data), random.Random(args.cell), []
    for name in args.sets:
        path = next(file for file in (args.run / name / "replies.jsonl", args.run / "replies.jsonl") if file.exists())
        rows = [row for row in lines(path) if row["set"] == name and row["prompt"] not in left_out]
        sets.append(chance.sample(rows, len(rows)))
    rows = {row["prompt"]: row for turn in zip_longest(*sets) for row in turn if row}
    args.to.mkdir(parents=True, exist_ok=True)
    text = "".join(
        json.dumps(
            {
                "key": key_of(row["prompt"], row["completion"]),
                "cell": args.cell,
                "part": args.part,
                "kind": known.get(row["prompt"], "benign"),
                "prompt": row["prompt"],
                "completion": row["completion"],
                "finish": row["finish"],
                "temperature": args.temperature,
            },
            ensure_ascii=False,
        )
        + "\n"
        for row in list(rows.values())[: args.most]
    )
    (args.to / f"{args.cell}.jsonl").write_text(text, encoding="utf-8")
    print(args.cell, text.count("\n"))


if __name__ == "__main__":
    main()
