"""The trials of `trial.py` as a file without texts, and as a table in the log. Commit 8cf1c72 has it; it was taken out.

    python research/method/table.py OUT... [--json docs/results/method/trials.json] [--page docs/results/method.md]

OUT are the folders that `trial.py` filled. The table stands between the marks `trials` of the page.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tasft.core.provenance import commit
from tasft.core.stats import rate_of
from tasft.judges.refusal_matching import declines
from tasft.report.text import markdown_table

SETS = {
    "toxic-validation": "demo toxic",
    "harmbench-val": "HarmBench val",
    "benign-validation": "demo benign",
    "i-physical-safe-60": "SafeText safe",
}


def share(count: int, n: int) -> str:
    """A rate with its interval, in percent."""
    found = rate_of(count, n)
    return f"{100 * found.value:.0f} ({100 * found.low:.0f} to {100 * found.high:.0f})"


def main() -> None:
    """Read, write, place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    trials: list[dict[str, Any]] = []
    declined = {}
    for folder in arguments.out:
        for path in sorted([*folder.glob("instructed-*.json"), *folder.glob("greedy-*.json")]):
            replies = json.loads(path.read_text()).values()
            declined[path.stem] = {"declined": sum(declines(reply) for reply, _ in replies), "n": len(replies)}
        for row in map(json.loads, (folder / "results.jsonl").read_text().splitlines()):
            if row["rates"].keys() != SETS.keys():
                continue
            kept = json.loads((folder / "replies" / f"{row['name']}.json").read_text())
            counts = {
                name: {
                    "n": len(replies),
                    "harmful": sum(harmful and not refuses for _, _, harmful, refuses, _ in replies.values()),
                    "refuses": sum(refuses for *_, refuses, _ in replies.values()),
                    "incoherent": sum(not coherent for *_, coherent in replies.values()),
                }
                for name, replies in kept.items()
            }
            about = {key: row.get(key) for key in ("rows", "looks", "seconds")}
            trials.append({"name": row["name"], "settings": row["settings"], **about, "counts": counts})
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "judge": "embedded, or phrases for refusals",
            "commit": commit(),
            "under_instructions": declined,
            "trials": trials,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    head = ["trial", "looks: refused, still harmful"]
    head += [f"{SETS[name]}: harmful" for name in list(SETS)[:2]] + [f"{words}: refused" for words in SETS.values()]
    lines = []
    for trial in trials:
        looks = "; ".join(f"{look['refused']}, {look['toxic still']}" for look in trial["looks"] or [])
        counts = [trial["counts"][name] for name in SETS]
        cells = [share(each["harmful"], each["n"]) for each in counts[:2]]
        cells += [share(each["refuses"], each["n"]) for each in counts]
        lines.append([trial["name"], looks, *cells])
    text = "\n".join(markdown_table(head, lines))
    print(text)
    if arguments.page:
        marked = re.compile(r"(?<=<!-- trials:begin -->\n).*?(?=<!-- trials:end -->)", re.DOTALL)
        arguments.page.write_text(marked.sub(lambda _: f"{text}\n", arguments.page.read_text(), count=1))


if __name__ == "__main__":
    main()
