"""How good the judges are that need no hub: the figures of docs/judges.md, from labels.

    python research/judge/measure.py --data DATA --replies REPLIES [--without xstest,moderation=FILE ...]
        [--second said.json]

Writes docs/results/judge/figures.json and mistakes.json (counts by kind, no text), and the tables between the
`measured`, `aims` and `kinds` markers of docs/judges.md. Own labels are those of the test part: neither its prompts nor
its models were trained on. Public sources that the shipped weights were trained on are measured by weights without
them, which `train.py --without` makes. Intervals are 95%, bootstrap over prompts. `--second` is what causal.py says of
the same replies.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from mixture import own
from public import SOURCES, Example, examples, key_of
from scipy.special import logit

sys.path.insert(0, str(Path(__file__).parents[1]))
from pages import put

from tasft.core.provenance import commit, write_json
from tasft.core.stats import agreement, auroc
from tasft.judges import Pair, load_judge
from tasft.judges.coherence import incoherence
from tasft.judges.network import Network
from tasft.judges.weights import WEIGHTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "judge"
MOST = 150

Figures = dict[str, Any]


def figures(
    labels: Sequence[float | None],
    verdicts: Sequence[bool | None],
    scores: Sequence[float] | None,
    groups: Sequence[str],
) -> Figures:
    """Agreement where label and verdict are known; AUROC over all that are labelled."""
    known = [index for index, label in enumerate(labels) if label is not None]
    decided = [index for index in known if verdicts[index] is not None]
    agreed = agreement(
        [bool(labels[i]) for i in decided], [bool(verdicts[i]) for i in decided], [groups[i] for i in decided]
    )
    result: Figures = {
        "n": len(known),
        "positive": sum(bool(labels[i]) for i in known),
        "undecided": len(known) - len(decided),
        **{name: asdict(agreed[name]) for name in ("precision", "recall", "f1")},
    }
    if scores is not None:
        area = auroc([bool(labels[i]) for i in known], [scores[i] for i in known], [groups[i] for i in known])
        result["auroc"] = asdict(area)
        result["precision_at_recall_75"] = at_recall([bool(labels[i]) for i in known], [scores[i] for i in known])
    return result


def at_recall(labels: Sequence[bool], scores: Sequence[float], least: float = 0.75) -> float | None:
    """The best precision of a threshold whose recall is at least so much."""
    order = np.argsort(-np.array(scores), kind="stable")
    hits = np.cumsum(np.array(labels)[order])
    if not len(hits) or not hits[-1]:
        return None
    enough = hits >= least * hits[-1]
    return float((hits / np.arange(1, len(hits) + 1))[enough].max())


def read_by(network: Network, rows: Sequence[Example]) -> list[Any]:
    return network.read([Pair("", row.prompt, row.reply) for row in rows])


def of_own(rows: Sequence[Example]) -> tuple[dict[str, dict[str, Figures]], list[dict[str, Any]]]:
    """Outcome -> judge -> figures; and the classifier's mistakes."""
    groups = [row.prompt for row in rows]
    pairs = [Pair(str(index), row.prompt, row.reply) for index, row in enumerate(rows)]
    judge: Any = load_judge("classifier")
    readings = judge.network.read(pairs)
    verdicts = {name: load_judge(name).judge(pairs) for name in ("classifier", "refusal_matching")}
    limits = judge.network.settings["limits"]
    rules = [incoherence(row.prompt, row.reply) is not None for row in rows]
    harm = [row.harmful for row in rows]
    result: dict[str, dict[str, Figures]] = {"harm": {}, "refusal": {}, "rambling": {}, "broken": {}}
    for name, of_judge in verdicts.items():
        of_harm = [reading.harmful for reading in readings] if name == "classifier" else None
        result["harm"][name] = figures(harm, [verdict.harmful for verdict in of_judge], of_harm, groups)
        of_refusal = [reading.declines for reading in readings] if name == "classifier" else None
        result["refusal"][name] = figures(
            [row.declines for row in rows], [verdict.refusal for verdict in of_judge], of_refusal, groups
        )
    result["harm"]["classifier, undecided as by its nearer side"] = figures(
        harm,
        [reading.harmful >= (judge.low + judge.threshold) / 2 for reading in readings],
        [reading.harmful for reading in readings],
        groups,
    )
    for what in ("rambling", "broken"):
        scores = [getattr(reading, what) for reading in readings]
        labels = [getattr(row, what) for row in rows]
        result[what]["classifier"] = figures(labels, [score >= limits[what] for score in scores], scores, groups)
        result[what]["rules of coherence"] = figures(labels, rules, None, groups)
    result["broken"]["rules or classifier"] = figures(
        [row.broken for row in rows],
        [rule or reading.broken >= limits["broken"] for rule, reading in zip(rules, readings, strict=True)],
        None,
        groups,
    )
    mistakes = []
    for row, verdict, reading in zip(rows, verdicts["classifier"], readings, strict=True):
        for what, label, predicted in (
            ("harm", row.harmful, verdict.harmful),
            ("refusal", row.declines, verdict.refusal),
        ):
            if label is not None and predicted is not None and bool(label) != predicted:
                kind = "broken" if row.broken else "rambling" if row.rambling else "sound"
                mistakes.append(
                    {
                        "of": what,
                        "missed": bool(label),
                        "reply": kind,
                        "asks_for_harm": bool(row.asks),
                        "cell": row.source,
                        "score": reading.harmful,
                    }
                )
    return result, mistakes


def by_cell(rows: Sequence[Example]) -> dict[str, Figures]:
    """Cell -> how well the classifier ranks harm there."""
    read = read_by(Network(), rows)
    result = {}
    for cell in sorted({row.source for row in rows}):
        some = [(row, reading.harmful) for row, reading in zip(rows, read, strict=True) if row.source == cell]
        known = [(bool(row.harmful), score, row.group) for row, score in some if row.harmful is not None]
        area = auroc(*(list(column) for column in zip(*known, strict=True)))
        result[cell.removeprefix("own-")] = {
            "n": len(known),
            "positive": sum(label for label, _, _ in known),
            "auroc": asdict(area),
        }
    return result


def of_public(data: Path, without: dict[str, Path]) -> dict[str, Figures]:
    """Source -> figures of harm and refusal, by weights that were not trained on it; at most MOST pairs."""
    result = {}
    shipped = Network()
    for name, source in SOURCES.items():
        if source.trains and name not in without:
            continue
        rows = [row for row in examples(name, data) if row.reply.strip()]
        if len(rows) > MOST:
            rows = random.Random(0).sample(rows, MOST)
        network = Network(without[name]) if source.trains else shipped
        limits, readings, groups = network.settings["limits"], read_by(network, rows), [row.group for row in rows]
        low, high = limits["harmful"]
        harm = [reading.harmful for reading in readings]
        verdicts = [None if low <= score < high else score >= high for score in harm]
        result[name] = {"trained on": False, "harm": figures([row.harmful for row in rows], verdicts, harm, groups)}
        if any(row.declines for row in rows):
            scores = [reading.declines for reading in readings]
            result[name]["refusal"] = figures(
                [row.declines for row in rows], [s >= limits["declines"] for s in scores], scores, groups
            )
    return result


def of_second(path: Path, rows: Sequence[Example]) -> dict[str, dict[str, Figures]]:
    """Outcome -> judge -> how well it ranks: SmolLM2, and the mean of its log-odds and the classifier's."""
    by_key = {row["key"]: row for row in json.loads(path.read_text("utf-8"))}
    readings: dict[str, dict[str, Figures]] = {}
    read = read_by(Network(), rows)
    for outcome, name in (("harm", "harmful"), ("refusal", "declines"), ("rambling", "rambling"), ("broken", "broken")):
        known = [index for index, row in enumerate(rows) if getattr(row, name) is not None]
        labels, groups = [bool(getattr(rows[i], name)) for i in known], [rows[i].group for i in known]
        second = np.array([by_key[key_of(rows[i].prompt, rows[i].reply)][name] for i in known])
        first = logit(np.clip([getattr(read[i], name) for i in known], 1e-6, 1 - 1e-6))
        readings[outcome] = {
            judge: {
                "n": len(known),
                "positive": sum(labels),
                "undecided": 0,
                "auroc": asdict(auroc(labels, list(scores), groups)),
            }
            for judge, scores in (
                ("SmolLM2 as judge", second),
                ("mean of both", second / second.std() + first / first.std()),
            )
        }
    return readings


def cell(figure: dict[str, Any] | float | None) -> str:
    if figure is None or isinstance(figure, float):
        return "–" if figure is None else f"{figure:.2f}"
    if figure["value"] is None:
        return "–"
    return f"{figure['value']:.2f}" + (
        f" ({figure['low']:.2f} to {figure['high']:.2f})" if figure["low"] is not None else ""
    )


def tables(result: dict[str, Any]) -> str:
    measures = ("auroc", "precision", "recall", "f1")
    head = "| | judge | n | positive | undecided | AUROC | precision | recall | F1 |\n"
    head += "|---|---|---:|---:|---:|---|---|---|---|"
    lines = [head]
    for outcome, judges in result["own"].items():
        for judge, row in judges.items():
            lines.append(
                f"| {outcome} | {judge} | {row['n']} | {row['positive']} | {row['undecided']} | "
                + " | ".join(cell(row.get(name)) for name in measures)
                + " |"
            )
    first = f"{result['replies']} replies of {result['cells']} models to {result['prompts']} prompts"
    parts = [f"Own labels, test part: {first}. Of `{result['commit']}`.", "", *lines, ""]
    parts += ["Harm by model:", "", "| model | n | harmful | AUROC |", "|---|---:|---:|---|"]
    parts += [
        f"| {name} | {row['n']} | {row['positive']} | {cell(row['auroc'])} |"
        for name, row in result["harm_by_cell"].items()
    ]
    parts += ["", "Public labels, by weights that were not trained on them:", "", head.replace("| |", "| source |", 1)]
    for source, by_outcome in result["public"].items():
        for what in ("harm", "refusal"):
            if row := by_outcome.get(what):
                counts = f"| {source} | {what} | {row['n']} | {row['positive']} | {row['undecided']} | "
                parts.append(counts + " | ".join(cell(row.get(name)) for name in measures) + " |")
    return "\n".join(parts)


def aims(result: dict[str, Any]) -> str:
    """What was aimed at, what was reached, and by how much it is missed."""
    own, public = result["own"], result["public"]
    harm, broken = own["harm"]["classifier"], own["broken"]["rules or classifier"]
    areas = {name: by_outcome["harm"]["auroc"]["value"] for name, by_outcome in public.items()}
    refusals = {
        name: by_outcome["refusal"]["auroc"]["value"] for name, by_outcome in public.items() if "refusal" in by_outcome
    }
    worst, least = min(areas, key=lambda name: areas[name]), min(refusals, key=lambda name: refusals[name])
    rows = [
        ("harm, test part, AUROC", 0.92, harm["auroc"]["value"]),
        ("harm, test part, precision at recall 0.75", 0.75, harm["precision_at_recall_75"]),
        ("refusal, test part, F1", 0.93, own["refusal"]["classifier"]["f1"]["value"]),
        ("rambling, test part, F1", 0.75, own["rambling"]["classifier"]["f1"]["value"]),
        ("broken text by rules or classifier, test part, recall", 0.8, broken["recall"]["value"]),
        ("the same, precision", 0.9, broken["precision"]["value"]),
        (f"harm, {len(areas)} sources never trained on, mean AUROC", 0.85, float(np.mean(list(areas.values())))),
        (f"harm, the worst of them ({worst}), AUROC", 0.8, areas[worst]),
        (f"refusal, the worst source never trained on ({least}), AUROC", 0.95, refusals[least]),
    ]
    lines = ["| aim | wanted | reached | |", "|---|---:|---:|---|"]
    for what, wanted, reached in rows:
        word = "reached" if reached >= wanted else f"missed by {wanted - reached:.2f}"
        lines.append(f"| {what} | {wanted:.2f} | {reached:.2f} | {word} |")
    return "\n".join(lines)


def kinds_of(mistakes: Sequence[dict[str, Any]], count: Counter[Any]) -> str:
    """Mistakes by kind, as a table."""
    lines = ["| of | mistake | reply | prompt | count |", "|---|---|---|---|---:|"]
    lines += [f"| {' | '.join(key)} | {number} |" for key, number in count.most_common()]
    return "\n".join([*lines, "", f"{len(mistakes)} mistakes in all, replies on which it is undecided left out."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--replies", type=Path)
    parser.add_argument("--labels", type=Path, default=RESULTS / "labels.jsonl")
    parser.add_argument("--without", nargs="*", default=[], metavar="SOURCE=FILE")
    parser.add_argument("--second", type=Path)
    asked = parser.parse_args()
    rows = own(asked.labels, asked.replies, "test")
    outcomes, mistakes = of_own(rows)
    alone, _ = of_own([row for row in rows if "gemma" not in row.source])
    outcomes["harm"]["classifier, on replies of SmolLM2 alone"] = alone["harm"]["classifier"]
    if asked.second:
        for outcome, judges in of_second(asked.second, rows).items():
            outcomes[outcome] |= judges
    pairs = (option.split("=", 1) for option in asked.without)
    without = {name: Path(file) for names, file in pairs for name in names.split(",")}
    result = {
        "commit": commit(),
        "weights": WEIGHTS.name,
        "settings": Network().settings,
        "replies": len(rows),
        "prompts": len({row.prompt for row in rows}),
        "cells": len({row.source for row in rows}),
        "own": outcomes,
        "harm_by_cell": by_cell(rows),
        "public": of_public(asked.data, without),
    }
    counts = Counter(
        (
            mistake["of"],
            "missed" if mistake["missed"] else "false alarm",
            mistake["reply"],
            "asks for harm" if mistake["asks_for_harm"] else "harmless prompt",
        )
        for mistake in mistakes
    )
    write_json(RESULTS / "mistakes.json", [{"what": list(key), "count": count} for key, count in counts.most_common()])
    write_json(RESULTS / "figures.json", result)
    for name, text in (("measured", tables(result)), ("aims", aims(result)), ("kinds", kinds_of(mistakes, counts))):
        put(ROOT / "docs" / "judges.md", name, text)
    print(tables(result))


if __name__ == "__main__":
    main()
