"""What the sweeps of recipes/small say: the weight that is chosen for each penalty, and the tables of docs/results.

    python scripts/small.py choose runs/small-search           # one weight for each penalty, as JSON on stdout
    python scripts/small.py keep runs/small-search search      # table and report, no replies, to docs/results/small
    python scripts/small.py tables                             # docs/results/README.md from what was kept

The utility of a weight is the share of safe and coherent replies to the toxic validation prompts, less the shares of
refused and of incoherent replies to the ordinary ones: a model that refuses everything or falls silent gains nothing.
"""

import argparse
import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"
KEPT = ("sweep.json", "table.csv", "report/report.md", "report/index.html")

Row = dict[str, str]


def table(folder: Path) -> list[Row]:
    with (folder / "table.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["state"] == "done"]


def utility(row: Row) -> float:
    wrong = float(row["final.ordinary.embedded.refusal"]) + float(row["final.ordinary.embedded.incoherent"])
    return float(row["final.toxic.embedded.safe_coherent"]) - wrong


def chosen(rows: list[Row]) -> dict[str, Row]:
    """Of each penalty the row of highest utility; of equal ones that of the smaller weight."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: float(row["train.penalty_weight"])):
        name = row["train.penalty"]
        if name not in best or utility(row) > utility(best[name]):
            best[name] = row
    return best


def percent(row: Row, column: str, interval: bool = True) -> str:
    if not row.get(column):
        return "—"
    value = f"{float(row[column]):.0%}"
    if not interval or not row.get(f"{column}.low"):
        return value
    return f"{value} ({100 * float(row[f'{column}.low']):.0f} to {100 * float(row[f'{column}.high']):.0f})"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def search_table(rows: list[Row]) -> str:
    best = chosen(rows)
    head = [
        "penalty",
        "weight",
        "safe and coherent",
        "harmful",
        "incoherent",
        "ordinary refused",
        "ordinary incoherent",
    ]
    head += ["utility"]
    columns = [f"final.toxic.embedded.{name}" for name in ("safe_coherent", "harmful", "incoherent")]
    columns += [f"final.ordinary.embedded.{name}" for name in ("refusal", "incoherent")]
    first = rows[0]
    lines = [["the SFT model", "", *(percent(first, each.replace("final", "base", 1)) for each in columns), ""]]
    for row in rows:
        mark = "**" if row is best[row["train.penalty"]] else ""
        values = [percent(row, column, interval=False) for column in columns]
        weight = f"{mark}{float(row['train.penalty_weight']):g}{mark}"
        lines.append([f"`{row['train.penalty']}`", weight, *values, f"{utility(row):+.2f}"])
    return markdown(head, lines)


def what(row: Row) -> str:
    method = row.get("train.method") or "tasft"
    if method != "tasft":
        return method.upper()
    penalty = row.get("train.penalty") or "none"
    return "no penalty" if penalty == "none" else f"`{penalty}` {float(row['train.penalty_weight']):g}"


def grid_table(rows: list[Row]) -> str:
    names = ("safe_coherent", "harmful", "incoherent", "over_refusal")
    head = ["", "rows to avoid", "besides", "safe and coherent", "harmful", "incoherent", "XSTest-safe refused"]
    lines = [["the SFT model", "", "", *(percent(rows[0], f"before.{name}") for name in names)]]
    for row in rows:
        besides = [
            text
            for field, text in (("harvest.anchors", "anchors"), ("harvest.contrastive", "contrastive rows"))
            if row.get(field) not in (None, "", "none", "None")
        ]
        count = row.get("harvest.rows", "")
        lines.append([what(row), count, ", ".join(besides), *(percent(row, name) for name in names)])
    return markdown(head, lines)


def keep(sweep: Path, name: str) -> None:
    for path in KEPT:
        target = RESULTS / "small" / name / Path(path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sweep / path, target)


def tables() -> dict[str, str]:
    """Marker in docs/results/README.md -> the table that stands there."""
    makers: dict[str, Any] = {"search": search_table, "grid": grid_table}
    return {
        f"small-{name}": make(table(RESULTS / "small" / name))
        for name, make in makers.items()
        if (RESULTS / "small" / name / "table.csv").exists()
    }


def written(page: str) -> str:
    for marker, text in tables().items():
        page, found = re.subn(
            rf"(<!-- {marker}:begin -->).*?(<!-- {marker}:end -->)",
            lambda match, text=text: f"{match[1]}\n\n{text}\n\n{match[2]}",
            page,
            flags=re.DOTALL,
        )
        if not found:
            raise SystemExit(f"docs/results/README.md has no <!-- {marker}:begin --> ... <!-- {marker}:end -->")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("choose").add_argument("sweep", type=Path)
    keeping = commands.add_parser("keep")
    keeping.add_argument("sweep", type=Path)
    keeping.add_argument("name")
    commands.add_parser("tables")
    asked = parser.parse_args()
    if asked.command == "choose":
        best = chosen(table(asked.sweep)).items()
        print(
            json.dumps({name: {"weight": row["train.penalty_weight"], "utility": utility(row)} for name, row in best})
        )
    elif asked.command == "keep":
        keep(asked.sweep, asked.name)
    else:
        page = RESULTS / "README.md"
        page.write_text(written(page.read_text()))


if __name__ == "__main__":
    main()
