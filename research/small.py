"""What the sweeps of recipes/small say: the tables of docs/results and of README.

    python research/small.py keep runs/methods methods          # table and report, no replies, to docs/results/small
    python research/small.py changes runs/small-quality         # its runs against the SFT model, item by item, likewise
    python research/small.py methods                            # README's and demo.md's tables from what was kept
    python research/small.py gemma RUN NAME=STATE... --labels LABELS  # figures, and counts of labels, to gemma.json
    python research/small.py gemma RUN NAME=STATE... --as gemma-kto   # to gemma-kto.json
    python research/small.py tables                             # docs/results/README.md and gemma.md from what was kept

Figures are kept, replies are not.
"""

import argparse
import csv
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from collect import cell as shown
from pages import put

from tasft.core.provenance import commit, content_hash, read_json, write_json, write_jsonl
from tasft.core.stats import rate_of
from tasft.data.files import read_rows
from tasft.data.sets import expanded
from tasft.evaluate.results import compare

RESULTS = Path(__file__).parents[1] / "docs" / "results"
KEPT = ("sweep.json", "table.csv", "report/report.md")

GEMMA = ("gemma", "gemma-kto")
"""Sheets of docs/results/gemma.md: replies to each were judged by another version of the judge."""

TOPICS = 12  # XSTest has ten types in each half.

Row = dict[str, str]
Fields = dict[str, Any]

# Who wrote the replies that were read by hand; on the first sheet models whose weights came from a search that did not
# look at the topic.
LABELLED = {
    "labels-large": {
        "sft": "the SFT model",
        "stl": "STL",
        "emd": "`emd` 4",
        "nlcl": "`nlcl` 4",
        "emd_hinge": "`emd_hinge` 8",
    },
    "labels": {
        "emd": "`emd` 2",
        "nlcl": "`nlcl` 1",
        "none and anchors": "no penalty, anchors",
        "emd and anchors": "`emd` 2, anchors",
        "nlcl and anchors": "`nlcl` 1, anchors",
    },
}


def table(folder: Path) -> list[Row]:
    with (folder / "table.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["state"] == "done"]


def percent(row: Row, column: str) -> str:
    return f"{float(row[column]):.0%}" if row.get(column) else "—"


def with_interval(row: Row, column: str) -> str:
    low, high = (round(100 * float(row[f"{column}.{end}"])) for end in ("low", "high"))
    return f"{percent(row, column)} ({low}-{high})"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def what(row: Row) -> str:
    method = row.get("train.method") or "tasft"
    seed = f", seed {row['seed']}" if row.get("seed") else ""
    if method != "tasft":
        return method.upper() + seed
    penalty = row.get("train.penalty") or "none"
    return ("no penalty" if penalty == "none" else f"`{penalty}` {float(row['train.penalty_weight']):g}") + seed


def besides(row: Row) -> str:
    fields = (("harvest.anchors", "anchors"), ("harvest.contrastive", "contrastive rows"))
    return ", ".join(text for field, text in fields if row.get(field) not in (None, "", "none", "None"))


METHODS = {
    "sft": "SFT on Alpaca",
    "stl": "STL, 100 responses of another model",
    "kto": "KTO",
    "emd": "TA-SFT as in the paper (`emd`)",
    "prefilled": "the demo with anchors of one sentence",
    "demo": "**the demo**: `nlcl`, its own refusals",
}
"""What README calls the cells of recipes/small/sweep-methods.yaml, in its order."""


def method_of(row: Row) -> str:
    """Which of `METHODS` a cell is."""
    if method := row.get("train.method"):
        return method
    if row["harvest.anchors"] == "none":
        return row["train.penalty"]
    return "prefilled" if row["harvest.anchors"] == "prefilled" else "demo"


def harm(row: Row, state: str) -> list[str]:
    """Replies to toxic prompts: harmful, safe and coherent, incoherent."""
    before = {"base": "before.", "final": ""}[state]
    return [
        with_interval(row, f"{before}harmful"),
        percent(row, f"{before}safe_coherent"),
        percent(row, f"{before}incoherent"),
    ]


def refused(row: Row, state: str) -> list[str]:
    """Benign prompts that are refused: of XSTest, and plain ones."""
    xstest = with_interval(row, f"{state}.xstest-safe.classifier.refusal")
    return [xstest, percent(row, f"{state}.plain.classifier.refusal")]


def methods_table(rows: list[Row]) -> str:
    """The methods beside each other, on prompts that nothing was trained or chosen on."""
    head = ["", "harmful", "safe, coherent", "incoherent", "templates", "prefix", "XSTest refused", "plain refused"]
    head += ["accuracy"]

    def figures(row: Row, state: str) -> list[str]:
        before = {"base": "before.", "final": ""}[state]
        templates = percent(row, f"{state}.jailbreak.templates.success")
        prefix = percent(row, f"{state}.jailbreak.prefix.success")
        return [*harm(row, state), templates, prefix, *refused(row, state), percent(row, f"{before}capability")]

    made = {method_of(row): row for row in rows if row["state"] == "done"}
    lines = [["untouched", *figures(rows[0], "base")]]
    lines += [[words, *figures(made[name], "final")] for name, words in METHODS.items() if name in made]
    of = ("incoherent", "final.xstest-safe.classifier.refusal", "final.plain.classifier.refusal")
    of += ("final.jailbreak.templates.success", "capability")
    toxic, xstest, plain, attacked, items = (rows[0][f"{name}.n"] for name in of)
    decided = sorted(int(row["harmful.n"]) for row in [*rows, {"harmful.n": rows[0]["before.harmful.n"]}])
    return f"""{markdown(head, lines)}

SmolLM2-135M-Instruct: {toxic} toxic prompts ({decided[0]} to {decided[-1]} decided), \
{attacked} attacked, {xstest} of XSTest's safe, \
{plain} plain, {items} items of three tasks; judge `classifier`, 95% intervals, seed 0, \
commit {rows[0]["commit"]}; sweep-methods."""


PARTS = {
    ("train.penalty", "none"): "no penalty",
    ("train.rounds", "None"): "no rounds",
    ("harvest.recover", "8"): "with recoveries",
}
"""How a cell of recipes/small/sweep-ablation.yaml differs from the demo."""


def ablation_table(rows: list[Row]) -> str:
    """The demo with several seeds, and with a part changed, on prompts that nothing was trained or chosen on."""
    head = ["", "harmful", "safe, coherent", "incoherent", "templates", "prefix", "XSTest refused", "plain refused"]

    def figures(row: Row, state: str) -> list[str]:
        attacks = (with_interval(row, f"{state}.jailbreak.{name}.success") for name in ("templates", "prefix"))
        return [*harm(row, state), *attacks, *refused(row, state)]

    def name(row: Row) -> str:
        told = [words for (field, value), words in PARTS.items() if row.get(field) == value]
        return ", ".join([*(told or ["**the demo**"]), f"seed {row['seed'] or 0}"])

    lines = [["untouched", *figures(rows[0], "base")], *([name(row), *figures(row, "final")] for row in rows)]
    of = ("incoherent", "final.jailbreak.templates.success", "final.xstest-safe.classifier.refusal")
    of += ("final.plain.classifier.refusal",)
    toxic, attacked, xstest, plain = (rows[0][f"{each}.n"] for each in of)
    return f"""{markdown(head, lines)}

{toxic} toxic prompts, {attacked} attacked, {xstest} of XSTest's safe, {plain} plain; judge `classifier`, \
95% intervals, commits {", ".join(dict.fromkeys(row["commit"] for row in rows))}; `small/ablation/`."""


READ = {
    "untouched": "untouched",
    "sft": METHODS["sft"],
    "stl": METHODS["stl"],
    "kto": METHODS["kto"],
    "emd": METHODS["emd"],
    "nlcl and anchors": METHODS["demo"],
    "later": "the demo, then 50 steps of Alpaca",
    "mixed": "the demo, then 50 steps with 40 of its refusals",
    **{name: f"the demo, {name}" for name in ("seed 1", "seed 2", "no penalty", "no rounds")},
    "recover": "the demo with recoveries",
}
"""What label.py calls the models whose replies were read, and README does."""


def read_table(name: str) -> str:
    """What two readers say of some models' replies to toxic prompts and to XSTest's safe ones."""
    files = {kind: f"small/{name}-read-{kind}.json" for kind in ("toxic", "benign")}
    toxic, benign = (read_json(RESULTS / file) for file in files.values())
    head = ["", "replies", "harmful", "declines", "incoherent", "safe and coherent"]
    head += ["XSTest-safe declined", "incoherent"]
    asked = [(toxic, ("harmful", "refusal", "incoherent", "safe_coherent")), (benign, ("refusal", "incoherent"))]
    lines = []
    for model, words in READ.items():
        if model not in toxic["methods"]:
            continue
        readers = [(sheet["methods"][model], measures) for sheet, measures in asked]
        counts = " + ".join(str(both[0]["harmful"]["n"]) for both, _ in readers)
        percents = [_both(both, measure) for both, measures in readers for measure in measures]
        lines.append([words, counts, *percents])
    kappa = {label: toxic["agreement"][label]["kappa"]["value"] for label in ("harmful", "refusal", "coherent")}
    return f"""{markdown(head, lines)}

Percent by each reader, of replies to toxic prompts and to XSTest's safe ones. Kappa on the first: \
{kappa["harmful"]:.2f} for harm, {kappa["refusal"]:.2f} for refusals, {kappa["coherent"]:.2f} for coherence; \
`{files["toxic"]}`, `{files["benign"]}`, which have intervals."""


def _both(readers: Sequence[Fields], measure: str) -> str:
    return ", ".join(f"{100 * reader[measure]['value']:.0f}" for reader in readers)


def gemma(run: Path, states: list[str], labels: Path | None) -> Fields:
    """What was harvested and trained, figures of states of models by name, and what a reader called replies."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for _, row in read_rows(labels) if labels else ():
        said = {"harmful": row["harmful"], "refusal": row["refusal"], "incoherent": row["coherent"] is False}
        said["off topic"] = row.get("on_topic") is False
        counts[row["method"]].update(replies=1, **{name: int(value is True) for name, value in said.items()})
    models = []
    for name, folder in ((name, Path(state)) for name, state in (each.split("=", 1) for each in states)):
        rates: Fields = defaultdict(dict)
        for path in sorted(folder.glob("*/*/summary.json")):
            figures = {name: value for name, value in read_json(path).items() if name != "by_topic"}
            rates[path.parts[-3]][path.parts[-2]] = _rounded(figures)
        trained_at = read_json(folder.parents[1] / "manifest.json")["commit"]
        models.append({"name": name, "commit": trained_at, "rates": rates})
    return {
        "recipe": yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")),
        "commit": read_json(run / "manifest.json")["commit"],
        "sft": read_json(run / "sft" / "summary.json"),
        "harvest": read_json(run / "harvest" / "summary.json"),
        "models": models,
        "labels": {name: dict(count) for name, count in counts.items()},
    }


def together(rates: Fields, judge: str, measure: str) -> str:
    """Share of the replies to all toxic sets, with its interval."""
    found = [rates[name][judge][measure] for name in expanded(["paper"]) if name in rates]
    counts = [round(each["value"] * each["n"]) for each in found]
    return shown(asdict(rate_of(sum(counts), sum(each["n"] for each in found))))


def gemma_tables(sheet: str) -> dict[str, str]:
    """Marker in docs/results/gemma.md -> the table that stands there."""
    found = read_json(RESULTS / f"{sheet}.json")
    judge = found["recipe"]["evaluate"]["judges"][0]
    models = [(each["name"], each["rates"]) for each in found["models"]]
    figures, counts = [], []
    for name, rates in models:
        toxic = [together(rates, judge, measure) for measure in ("safe_coherent", "harmful", "refusal", "incoherent")]
        benign = [
            shown(rates["xstest-safe"][judge][measure]) if "xstest-safe" in rates else "—"
            for measure in ("refusal", "incoherent")
        ]
        figures.append([name, *toxic, *benign])
        harmful = [rates[each][judge]["harmful"] if each in rates else None for each in expanded(["paper"])]
        counts.append([name, *(f"{each['value'] * each['n']:.0f} of {each['n']}" if each else "—" for each in harmful)])
    answers = ("replies", "harmful", "refusal", "incoherent", "off topic")
    labels = [[name, *(str(each.get(answer, 0)) for answer in answers)] for name, each in found["labels"].items()]
    head = [
        "",
        "safe and coherent",
        "harmful",
        "refused",
        "incoherent",
        "XSTest-safe refused",
        "XSTest-safe incoherent",
    ]
    return {
        f"{sheet}-grid": markdown(head, figures),
        f"{sheet}-counts": markdown(["", "I-Malicious", "I-CoNa", "I-Controversial", "HarmfulQ"], counts),
        f"{sheet}-labels": markdown(["", *answers], labels),
    }


def keep(sweep: Path, name: str) -> None:
    place = RESULTS / "small" / name
    place.mkdir(parents=True, exist_ok=True)
    for path in KEPT:
        shutil.copyfile(sweep / path, place / Path(path).name)
    write_jsonl(place / "summaries.jsonl", summaries(sweep))


def summaries(sweep: Path) -> list[Fields]:
    """Every `summary.json` of the finished runs, one that several share once, with the numbers of these runs.

    Rates by topic are left out where there are too many topics for the prompts: of one or two each they tell nothing.
    """
    found: dict[str, Fields] = {}
    for number, row in enumerate(_state(sweep)["cells"], 1):
        run = sweep / row["folder"]
        for path in sorted(run.rglob("summary.json")) if row["state"] == "done" else ():
            said = {"at": str(path.parent.relative_to(run)), **_rounded(read_json(path))}
            if len(said.get("by_topic", ())) > TOPICS:
                del said["by_topic"]
            found.setdefault(content_hash(said), {"runs": [], **said})["runs"].append(number)
    return list(found.values())


def _rounded(value: Any) -> Any:
    """With five digits, and without estimates of nothing."""
    if isinstance(value, dict):
        told = {key: each for key, each in value.items() if not isinstance(each, dict) or each.get("n", 1)}
        return {key: _rounded(each) for key, each in told.items()}
    return round(value, 5) if isinstance(value, float) else value


def _state(sweep: Path) -> Fields:
    found = read_json(sweep / "sweep.json")
    if found is None:
        raise SystemExit(f"{sweep}: there is no sweep.json; run tasft sweep first")
    return dict(found)


# What is paired item by item: the set and measure of `compare`, and the head of the column.
ITEMS = {
    ("capability/boolq", "acc"): "BoolQ",
    ("capability/piqa", "acc"): "PIQA",
    ("capability/openbookqa", "acc"): "OpenBookQA",
    ("quality/reference", "reference_nll"): "loss of reference answers",
}


def changes(sweep: Path) -> dict[str, Any]:
    """Of each finished run what changes from the SFT model, item by item."""
    found = []
    for row in _state(sweep)["cells"]:
        if row["state"] == "done":
            run = sweep / row["folder"]
            rows = {(each["set"], each["measure"]): each for each in compare(run / "evaluate" / "sft", run)["rows"]}
            told = {f"{name} {measure}": rows[name, measure] for name, measure in ITEMS if (name, measure) in rows}
            found.append({"run": run.name, "fields": row["fields"], **told})
    return {"commit": commit(), "changes": found}


def changes_table(found: dict[str, Any]) -> str:
    def cell(each: Fields, name: str, measure: str) -> str:
        if (row := each.get(f"{name} {measure}")) is None:
            return "—"
        change, scale, digits = row["difference"], *((100, 1) if row["mcnemar"] else (1, 3))
        value, low, high = (f"{scale * change[key]:+.{digits}f}" for key in ("value", "low", "high"))
        return f"{value} ({low} to {high})"

    lines = [
        [what(each["fields"]), besides(each["fields"]), *(cell(each, *item) for item in ITEMS)]
        for each in found["changes"]
    ]
    return markdown(["less the SFT model", "besides", *ITEMS.values()], lines)


def tables() -> dict[str, str]:
    """Marker in docs/results/README.md -> the table that stands there."""
    labelled = []
    for file, names in LABELLED.items():
        found = read_json(RESULTS / "small" / f"{file}.json")["methods"]
        labelled += [[name, *map(str, found[method].values())] for method, name in names.items()]
    return {
        "small-quality-pairs": changes_table(read_json(RESULTS / "small" / "quality-pairs.json")),
        "small-labels": markdown(["", "replies", "harmful", "refusals", "incoherent", "off topic"], labelled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    keeping = commands.add_parser("keep")
    keeping.add_argument("sweep", type=Path)
    keeping.add_argument("name")
    commands.add_parser("changes").add_argument("sweep", type=Path)
    base_model = commands.add_parser("gemma")
    base_model.add_argument("run", type=Path, help="In which all was trained.")
    base_model.add_argument("states", nargs="+", help="NAME=RUN/evaluate/STATE")
    base_model.add_argument("--labels", type=Path, help="A sheet that label.py has unblinded.")
    base_model.add_argument("--as", dest="name", choices=GEMMA, default=GEMMA[0])
    commands.add_parser("tables")
    commands.add_parser("methods")
    asked = parser.parse_args()
    if asked.command == "changes":
        write_json(RESULTS / "small" / "quality-pairs.json", changes(asked.sweep))
    elif asked.command == "methods":
        put(RESULTS.parents[1] / "README.md", "methods", methods_table(table(RESULTS / "small" / "methods")))
        put(RESULTS / "demo.md", "ablation", ablation_table(table(RESULTS / "small" / "ablation")))
        put(RESULTS / "demo.md", "read", read_table("methods"))
        put(RESULTS / "demo.md", "ablation-read", read_table("ablation"))
    elif asked.command == "gemma":
        write_json(RESULTS / f"{asked.name}.json", gemma(asked.run, asked.states, asked.labels))
    elif asked.command == "keep":
        keep(asked.sweep, asked.name)
    else:
        for name, text in tables().items():
            put(RESULTS / "README.md", name, text)
        for sheet in GEMMA:
            for name, text in gemma_tables(sheet).items():
                put(RESULTS / "gemma.md", name, text)


if __name__ == "__main__":
    main()
