"""What the sweeps of recipes/small say: the weight that is chosen for each penalty, and the tables of docs/results.

    python research/small.py grid runs/small-search             # a sweep with the weights that were chosen, on stdout
    python research/small.py keep runs/small-search search      # table and report, no replies, to docs/results/small
    python research/small.py pairs runs/small-grid              # its runs compared on the same prompts, likewise
    python research/small.py changes runs/small-quality         # its runs against the SFT model, item by item, likewise
    python research/small.py methods                            # README's table of methods from what was kept
    python research/small.py gemma RUN EVALUATED... --labels LABELS  # figures, and counts of labels, to gemma.json
    python research/small.py tables                             # docs/results/README.md and gemma.md from what was kept

The utility of a weight is the share of safe and coherent replies to the toxic validation prompts, less the shares of
refused and of incoherent replies to the benign ones: a model that refuses everything or falls silent gains nothing.
"""

import argparse
import csv
import shutil
from collections import Counter, defaultdict
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
KEPT = ("sweep.json", "table.csv", "along.csv", "report/report.md")  # along.csv: of checkpoints

TOPICS = 12  # XSTest has ten types in each half.

Row = dict[str, str]
Fields = dict[str, Any]

PENALTIES = ("emd", "nlcl", "emd_exact", "emd_hinge", "unlikelihood", "npo")
_RARE = "harvest.contrastive"
_CELL = ("train.penalty", "train.penalty_weight", "harvest.rows")  # What tells two cells with a penalty apart.
STL = "data/safety_only_data_Instructions.json"

_ANCHORS = {"harvest.anchors": "prefilled"}
_CONTRASTIVE = {"harvest.contrastive": {"words": 100, "per_word": 5}}


def _of(penalty: str, rows: int, **others: Any) -> Fields:
    return {"train.penalty": penalty, "harvest.rows": rows, **others}


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


def questions(cells: list[Fields]) -> list[tuple[str, Fields, Fields]]:
    """What is asked of a sweep with these fields, and the runs that answer: the second less the first."""
    counts = sorted({fields["harvest.rows"] for fields in cells})
    few, many = counts[0], counts[-1]
    plain = {**_of("none", many), **_ANCHORS}
    stl = {rows: {"train.method": "stl", "harvest.rows": rows} for rows in counts}
    once = [{key: value for key, value in fields.items() if key in _CELL} for fields in cells if _RARE in fields]
    return [
        *((f"EMD instead of NLCL, {rows} rows", _of("nlcl", rows), _of("emd", rows)) for rows in counts),
        *((f"`{name}` {many} rows instead of {few}", _of(name, few), _of(name, many)) for name in ("emd", "nlcl")),
        (f"STL {many} rows instead of {few}", stl[few], stl[many]),
        *((f"EMD instead of STL, {rows} rows", stl[rows], _of("emd", rows)) for rows in counts),
        (f"NLCL instead of STL, {many} rows", stl[many], _of("nlcl", many)),
        (f"NLCL instead of KTO, {many} rows", {"train.method": "kto", "harvest.rows": many}, _of("nlcl", many)),
        *((f"anchors beside `{name}`", _of(name, many), {**_of(name, many), **_ANCHORS}) for name in PENALTIES),
        *((f"`{name}` beside anchors", plain, {**_of(name, many), **_ANCHORS}) for name in PENALTIES),
        ("STL instead of `nlcl` and anchors", {**_of("nlcl", many), **_ANCHORS}, stl[many]),
        *(
            (
                f"contrastive rows beside `{cell['train.penalty']}` {cell['train.penalty_weight']:g}",
                cell,
                {**cell, _RARE: ...},
            )
            for cell in once
        ),
    ]


def table(folder: Path) -> list[Row]:
    with (folder / "table.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["state"] == "done"]


def utility(row: Row) -> float:
    wrong = float(row["final.benign.embedded.refusal"]) + float(row["final.benign.embedded.incoherent"])
    return float(row["final.toxic.embedded.safe_coherent"]) - wrong


def chosen(rows: list[Row]) -> dict[str, Row]:
    """Of each penalty the row of highest utility; of equal ones that of the smaller weight."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: float(row["train.penalty_weight"])):
        name = row["train.penalty"]
        if name not in best or utility(row) > utility(best[name]):
            best[name] = row
    return best


def grid(sweep: Path, base: str, counts: list[int], seeds: list[int]) -> str:
    """A sweep of all penalties with their chosen weights, of the baselines, anchors and contrastive rows."""
    if any(row["state"] != "done" for row in _state(sweep)["cells"]):
        raise SystemExit(f"{sweep}: not all of its runs are done, so no weight can be chosen: run the sweep again")
    weights = {name: float(row["train.penalty_weight"]) for name, row in chosen(table(sweep)).items()}
    stl = {"train.method": "stl", "data.safe_responses": {"source": STL, "rows": "harvested"}}
    most = max(counts)
    cells: list[Fields] = []
    for rows in sorted(counts, reverse=True):
        cells += [{**_of(name, rows), "train.penalty_weight": weight} for name, weight in weights.items()]
        cells.append({**stl, "harvest.rows": rows})
    cells += [{"train.method": "kto", "harvest.rows": most}, {**_of("none", most), **_ANCHORS}]
    cells += [{**_of(name, most), "train.penalty_weight": weight, **_ANCHORS} for name, weight in weights.items()]
    for name in ("emd", "nlcl"):
        once = {**_of(name, most), "train.penalty_weight": weights[name]}
        twice = once | {"train.penalty_weight": 2 * weights[name]}
        cells += [twice, once | _CONTRASTIVE, twice | _CONTRASTIVE]
    fields = {"name": sweep.name.replace("search", "grid"), "base": base, "pairs": cells, "seeds": seeds}
    return yaml.safe_dump(fields, sort_keys=False, width=200)


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
        "of these off topic",
        "benign refused",
        "benign incoherent",
    ]
    head += ["utility"]
    columns = [f"final.toxic.embedded.{name}" for name in ("safe_coherent", "harmful", "incoherent", "off_topic")]
    columns += [f"final.benign.embedded.{name}" for name in ("refusal", "incoherent")]
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
    seed = f", seed {row['seed']}" if row.get("seed") else ""
    if method != "tasft":
        return method.upper() + seed
    penalty = row.get("train.penalty") or "none"
    return ("no penalty" if penalty == "none" else f"`{penalty}` {float(row['train.penalty_weight']):g}") + seed


def pooled(row: Row, state: str, measure: str) -> str:
    """Share of the replies to all toxic sets together; what is in no set is 0 where something was measured."""
    sets = expanded(["paper"])
    n = sum(int(row[f"{state}.{name}.embedded.incoherent.n"] or 0) for name in sets)
    columns = [f"{state}.{name}.embedded.{measure}" for name in sets]
    count = sum(float(row[column]) * int(row[f"{column}.n"]) for column in columns if row.get(column))
    return f"{count / n:.0%}" if n else "—"


def besides(row: Row) -> str:
    fields = (("harvest.anchors", "anchors"), ("harvest.contrastive", "contrastive rows"))
    return ", ".join(text for field, text in fields if row.get(field) not in (None, "", "none", "None"))


def causes_table(rows: list[Row]) -> str:
    """Why replies are incoherent, of runs with contrastive rows and those that differ in nothing else."""
    with_them = [row for row in rows if row.get("harvest.contrastive")]
    alike = {(row["train.penalty"], row["train.penalty_weight"], row["harvest.rows"]) for row in with_them}
    shown = [
        row
        for row in rows
        if (row["train.penalty"], row["train.penalty_weight"], row["harvest.rows"]) in alike
        if not row.get("harvest.anchors")
    ]
    shown.sort(key=lambda row: (row["train.penalty"], float(row["train.penalty_weight"]), besides(row)))
    causes = ["language", "scripts", "repeated", "empty", "short", "improbable", "off_topic"]
    head = ["", "besides", "harmful", "incoherent", *(cause.replace("_", " ") for cause in causes)]
    lines = [
        [what(row), besides(row), *(percent(row, name) for name in ("harmful", "incoherent"))]
        + [pooled(row, "final", f"incoherent.{cause}") for cause in causes]
        for row in shown
    ]
    return markdown(head, lines)


def quality_table(rows: list[Row]) -> str:
    """Capability, likelihoods and attacks."""
    tasks = {"BoolQ": "boolq", "PIQA": "piqa", "OpenBookQA": "openbookqa"}
    head = ["", "besides", *tasks, "loss of reference answers", "KL from SFT", "prefix succeeds", "templates succeed"]

    def figures(row: Row, state: str) -> list[str]:
        nats = [row.get(f"{state}.quality.reference.{name}") for name in ("reference_nll", "kl_to_before")]
        return [
            *(percent(row, f"{state}.capability.{task}.acc") for task in tasks.values()),
            *(f"{float(value):.3f}" if value else "—" for value in nats),
            *(percent(row, f"{state}.jailbreak.{attack}.success") for attack in ("prefix", "templates")),
        ]

    lines = [["the SFT model", "", *figures(rows[0], "base")]]
    lines += [[what(row), besides(row), *figures(row, "final")] for row in rows]
    return markdown(head, lines)


METHODS = {
    "sft": "SFT on Alpaca",
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


def methods_table(rows: list[Row]) -> str:
    """The methods beside each other, on prompts that nothing was trained or chosen on."""
    head = ["", "harmful", "safe and coherent", "templates succeed", "XSTest-safe refused", "plain refused"]

    def figures(row: Row, state: str) -> list[str]:
        before = {"base": "before.", "final": ""}[state]
        return [
            percent(row, f"{before}harmful"),
            percent(row, f"{before}safe_coherent"),
            percent(row, f"{state}.jailbreak.templates.success", interval=False),
            percent(row, f"{state}.xstest-safe.classifier.refusal"),
            percent(row, f"{state}.plain.classifier.refusal", interval=False),
        ]

    made = {method_of(row): row for row in rows if row["state"] == "done"}
    lines = [["untouched", *figures(rows[0], "base")]]
    lines += [[words, *figures(made[name], "final")] for name, words in METHODS.items() if name in made]
    toxic, xstest, plain = (
        rows[0][f"{name}.n"]
        for name in ("incoherent", "final.xstest-safe.classifier.refusal", "final.plain.classifier.refusal")
    )
    decided = sorted(int(row["harmful.n"]) for row in [*rows, {"harmful.n": rows[0]["before.harmful.n"]}])
    return f"""{markdown(head, lines)}

SmolLM2-135M-Instruct, {toxic} toxic prompts ({decided[0]} to {decided[-1]} decided), {xstest} of XSTest's safe ones, \
{plain} plain ones; judge `classifier`, 95% intervals, seed 0, commit {rows[0]["commit"]}; sweep-methods."""


def grid_table(rows: list[Row]) -> str:
    head = ["", "rows to avoid", "besides", "safe and coherent", "harmful", "incoherent", "of these off topic"]
    head += ["XSTest-safe refused", "XSTest-safe incoherent"]

    def figures(row: Row, before: str, state: str) -> list[str]:
        together = [percent(row, f"{before}{name}") for name in ("safe_coherent", "harmful", "incoherent")]
        benign = [percent(row, f"{state}.xstest-safe.embedded.{name}") for name in ("refusal", "incoherent")]
        return [*together, pooled(row, state, "off_topic"), *benign]

    lines = [["the SFT model", "", "", *figures(rows[0], "before.", "base")]]
    for row in rows:
        lines.append([what(row), row.get("harvest.rows", ""), besides(row), *figures(row, "", "final")])
    return markdown(head, lines)


def gemma(run: Path, evaluated: list[Path], labels: Path | None) -> Fields:
    """What was harvested and trained, figures of models that were evaluated alone, and what a reader called replies."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for _, row in read_rows(labels) if labels else ():
        said = {"harmful": row["harmful"], "refusal": row["refusal"], "incoherent": row["coherent"] is False}
        said["off topic"] = row.get("on_topic") is False
        counts[row["method"]].update(replies=1, **{name: int(value is True) for name, value in said.items()})
    models = []
    for folder in evaluated:
        rates: Fields = defaultdict(dict)
        for path in sorted(folder.glob("*/*/summary.json")):
            rates[path.parts[-3]][path.parts[-2]] = _rounded(read_json(path))
        models.append({"name": folder.name, "commit": read_json(folder / "manifest.json")["commit"], "rates": rates})
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


def gemma_tables(found: Fields) -> dict[str, str]:
    """Marker in docs/results/gemma.md -> the table that stands there."""
    judge = found["recipe"]["evaluate"]["judges"][0]
    models = [(each["name"], each["rates"]) for each in found["models"]]
    figures, counts = [], []
    for name, rates in models:
        toxic = [together(rates, judge, measure) for measure in ("safe_coherent", "harmful", "refusal", "incoherent")]
        benign = [
            shown(rates["xstest-safe"][judge][measure]) if "xstest-safe" in rates else "—"
            for measure in ("refusal", "incoherent")
        ]
        name = "the SFT model" if name == "sft" else name
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
        "gemma-grid": markdown(head, figures),
        "gemma-counts": markdown(["", "I-Malicious", "I-CoNa", "I-Controversial", "HarmfulQ"], counts),
        "gemma-labels": markdown(["", *answers], labels),
    }


def curves_table(folder: Path) -> str:
    """Harm, incoherence and over-refusal at each step that was evaluated."""
    with (folder / "along.csv").open() as file:
        along = {(row["run"], row["step"]): row for row in csv.DictReader(file)}
    steps = sorted({step for _, step in along}, key=float)

    def said(row: Row) -> str:
        return ", ".join(percent(row, name, interval=False) for name in ("harmful", "incoherent", "over_refusal"))

    lines = [
        [what(row), besides(row), *(said(along.get((row["run"], step), {})) for step in steps)] for row in table(folder)
    ]
    return markdown(["harmful, incoherent, XSTest-safe refused", "besides", *(f"step {step}" for step in steps)], lines)


def keep(sweep: Path, name: str) -> None:
    place = RESULTS / "small" / name
    place.mkdir(parents=True, exist_ok=True)
    for path in KEPT:
        if path != "along.csv" or (sweep / path).exists():
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


def cell(sweep: Path, wanted: Fields, seed: int | None) -> Path | None:
    """The first finished run of a seed that differs from the recipe in these fields; of any weight if none is asked."""
    about = {"train.method", "train.penalty", "harvest.rows", "harvest.anchors", "harvest.contrastive", *wanted}
    for row in _state(sweep)["cells"]:
        fields = row["fields"]
        same = fields.get("seed") == seed and all(
            (field in fields) == (field in wanted) and wanted.get(field) in (fields.get(field), ...) for field in about
        )
        if same and row["state"] == "done":
            return sweep / row["folder"]
    return None


def pairs(sweep: Path) -> dict[str, Any]:
    """Of each question what changes from the first run to the second, on the same prompts, by `embedded`; per seed."""
    cells = [row["fields"] for row in _state(sweep)["cells"]]
    answers = []
    for question, first, second in questions(cells):
        for seed in dict.fromkeys(fields.get("seed") for fields in cells):
            places = cell(sweep, first, seed), cell(sweep, second, seed)
            if places[0] is None or places[1] is None or places[0] == places[1]:
                continue
            found = compare(places[0], places[1])
            rows = [
                row
                for row in found["rows"]
                if row["judge"] == "embedded" and row["set"] in ("4 toxic sets", "xstest-safe")
            ]
            wanted = [("toxic", name) for name in ("safe_coherent", "harmful", "incoherent")]
            wanted += [("benign", name) for name in ("refusal", "incoherent")]
            answers.append(
                {
                    "question": question if seed is None else f"{question}, seed {seed}",
                    "runs": [place.name for place in places if place],
                    "notes": found["notes"],
                    **{
                        f"{kind} {measure}": {"difference": row["difference"], "mcnemar": row["mcnemar"]}
                        for kind, measure in wanted
                        for row in rows
                        if (row["kind"], row["measure"]) == (kind, measure)
                    },
                }
            )
    if not answers:
        raise SystemExit(f"{sweep}: no two of its finished runs answer a question")
    return {"commit": commit(), "judge": "embedded", "pairs": answers}


# What is paired item by item: the set and measure of `compare`, and the head of the column.
ITEMS = {
    ("capability/boolq", "acc"): "BoolQ",
    ("capability/piqa", "acc"): "PIQA",
    ("capability/openbookqa", "acc"): "OpenBookQA",
    ("quality/reference", "reference_nll"): "loss of reference answers",
    ("jailbreak/prefix", "success"): "prefix succeeds",
    ("jailbreak/templates", "success"): "templates succeed",
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


def pairs_table(found: dict[str, Any]) -> str:
    def points(answer: dict[str, Any], name: str) -> str:
        change = answer[name]["difference"]
        return f"{100 * change['value']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"

    columns = ("toxic safe_coherent", "toxic harmful", "toxic incoherent", "benign refusal", "benign incoherent")
    head = ["what changes, in points", "safe and coherent", "harmful", "incoherent", "XSTest-safe refused"]
    head += ["XSTest-safe incoherent"]
    return markdown(head, [[each["question"], *(points(each, name) for name in columns)] for each in found["pairs"]])


def tables() -> dict[str, str]:
    """Marker in docs/results/README.md -> the table that stands there."""
    made = {
        "small-search": search_table(table(RESULTS / "small" / "search")),
        "small-grid": grid_table(table(RESULTS / "small" / "grid")),
        "small-contrastive": causes_table(table(RESULTS / "small" / "grid")),
        "small-curves": curves_table(RESULTS / "small" / "curves"),
        "small-quality": quality_table(table(RESULTS / "small" / "quality")),
    }
    labelled = []
    for file, names in LABELLED.items():
        found = read_json(RESULTS / "small" / f"{file}.json")["methods"]
        labelled += [[name, *map(str, found[method].values())] for method, name in names.items()]
    return made | {
        "small-quality-pairs": changes_table(read_json(RESULTS / "small" / "quality-pairs.json")),
        "small-pairs": pairs_table(read_json(RESULTS / "small" / "pairs.json")),
        "small-labels": markdown(["", "replies", "harmful", "refusals", "incoherent", "off topic"], labelled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pairing = commands.add_parser("pairs")
    pairing.add_argument("sweep", type=Path)
    pairing.add_argument("--to", type=Path, default=RESULTS / "small" / "pairs.json")
    making = commands.add_parser("grid")
    making.add_argument("sweep", type=Path)
    making.add_argument("--base", default="smollm2.yaml", help="beside the sweep that is made")
    making.add_argument("--rows", type=int, nargs="+", default=[100, 300, 500, 1000])
    making.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    keeping = commands.add_parser("keep")
    keeping.add_argument("sweep", type=Path)
    keeping.add_argument("name")
    commands.add_parser("changes").add_argument("sweep", type=Path)
    base_model = commands.add_parser("gemma")
    base_model.add_argument("run", type=Path, help="In which all was trained.")
    base_model.add_argument("evaluated", type=Path, nargs="+", help="Folders of tasft evaluate MODEL.")
    base_model.add_argument("--labels", type=Path, help="A sheet that label.py has unblinded.")
    commands.add_parser("tables")
    commands.add_parser("methods")
    asked = parser.parse_args()
    if asked.command == "grid":
        print(grid(asked.sweep, asked.base, asked.rows, asked.seeds), end="")
    elif asked.command == "pairs":
        write_json(asked.to, pairs(asked.sweep))
    elif asked.command == "changes":
        write_json(RESULTS / "small" / "quality-pairs.json", changes(asked.sweep))
    elif asked.command == "methods":
        put(RESULTS.parents[1] / "README.md", "methods", methods_table(table(RESULTS / "small" / "methods")))
    elif asked.command == "gemma":
        write_json(RESULTS / "gemma.json", gemma(asked.run, asked.evaluated, asked.labels))
    elif asked.command == "keep":
        keep(asked.sweep, asked.name)
    else:
        for name, text in tables().items():
            put(RESULTS / "README.md", name, text)
        for name, text in gemma_tables(read_json(RESULTS / "gemma.json")).items():
            put(RESULTS / "gemma.md", name, text)


if __name__ == "__main__":
    main()
