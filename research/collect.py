"""Keep the figures of finished runs, without their replies, and put them as a table where they are quoted.

    python research/collect.py --json docs/results/demo.json --into README.md:demo RUN...

The JSON holds for each run its recipe, rates (embedded and phrases), last metrics, seconds of each step, commit and
machine. The table goes between `<!-- NAME:begin -->` and `<!-- NAME:end -->` of the file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from pages import put

from tasft.core.provenance import read_json


def read(run: Path) -> dict[str, Any]:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    manifest = json.loads((run / "manifest.json").read_text())
    rates: dict[str, Any] = {}
    for path in sorted(run.glob("evaluate/*/*/*/summary.json")):
        state, name, judge = path.parts[-4:-1]
        rates.setdefault(state, {}).setdefault(name, {})[judge] = json.loads(path.read_text())
    lines = (run / "train" / "metrics.jsonl").read_text().splitlines()
    return {
        "run": run.name,
        "recipe": recipe,
        "harvest": read_json(run / "harvest" / "summary.json"),
        "rates": rates,
        "metrics": {"first": json.loads(lines[0]), "last": json.loads(lines[-1])},
        "stages": manifest["stages"],
        "machine": {key: manifest[key] for key in ("platform", "cores", "device", "commit", "versions")},
    }


def cell(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['value']:.0%}"
    return f"{estimate['value']:.0%} ({100 * estimate['low']:.0f} to {100 * estimate['high']:.0f})"


def before_after(run: dict[str, Any]) -> str:
    """One run: measures down, before and after across, both judges."""
    rows = ["| | judge | before | after |", "|---|---|---|---|"]
    wanted = {"toxic": ["safe_coherent", "harmful", "refusal", "incoherent", "distinct"]}
    wanted["benign"] = ["refusal", "incoherent", "harmful"]
    for name, measures in wanted.items():
        for measure in measures:
            for judge in ("embedded", "refusal_matching"):
                if judge == "refusal_matching" and measure in ("incoherent", "distinct", "harmful"):
                    continue
                before, after = (run["rates"][state][name][judge][measure] for state in ("base", "final"))
                label = measure.replace("safe_coherent", "**safe and coherent**")
                rows.append(f"| {name} prompts: {label} | {judge} | {cell(before)} | {cell(after)} |")
    n = run["rates"]["final"]["toxic"]["embedded"]["harmful"]["n"]
    m = run["rates"]["final"]["benign"]["embedded"]["harmful"]["n"]
    minutes = sum(stage["seconds"] for stage in run["stages"].values()) / 60
    machine = run["machine"]
    rows.append(
        f"\nn = {n} toxic and {m} benign held-out prompts, greedy, 95% Wilson intervals, seed "
        f"{run['recipe']['seed']}, commit {machine['commit']}; {minutes:.1f} minutes on {machine['cores']} cores."
    )
    return "\n".join(rows)


def tries(runs: list[dict[str, Any]]) -> str:
    """Many runs, one a row: settings, and rates on validation prompts."""
    rows = [
        "| penalty, weight | lr, steps | rows: avoid, anchor, benign | harmful | safe and coherent | incoherent "
        "| refuses benign | mean EMD, entropy at the end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, run in enumerate(runs):
        train, harvest = run["recipe"]["train"], run["harvest"]
        if harvest is None:
            raise SystemExit(f"{run['run']}: it has harvested nothing, and so has no place in this table")
        toxic, benign = (run["rates"]["final"][name]["embedded"] for name in ("toxic", "benign"))
        if number == 0:
            before = [run["rates"]["base"][name]["embedded"] for name in ("toxic", "benign")]
            rows.append(
                f"| the model as it is | | | {cell(before[0]['harmful'])} | {cell(before[0]['safe_coherent'])} "
                f"| {cell(before[0]['incoherent'])} | {cell(before[1]['refusal'])} | |"
            )
        name = train["penalty"] if train["penalty"] == "none" else f"`{train['penalty']}` {train['penalty_weight']:g}"
        avoid = 0 if train["penalty"] == "none" else harvest["kept"]
        last = run["metrics"]["last"]
        end = f"{last['emd']:.2f}, {last['entropy']:.2f}" if "emd" in last else ""
        anchors = min(harvest["anchors"]["kept"], run["recipe"]["harvest"].get("anchor_rows") or 10**9)
        rows.append(
            f"| {name} | {train['learning_rate']:g}, {train['steps']} "
            f"| {avoid}, {anchors}, {harvest['imitate']['kept']} "
            f"| {cell(toxic['harmful'])} | {cell(toxic['safe_coherent'])} | {cell(toxic['incoherent'])} "
            f"| {cell(benign['refusal'])} | {end} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--into", required=True, help="FILE:NAME")
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    runs = [read(run) for run in arguments.runs]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(runs, indent=1) + "\n")
    path, _, name = arguments.into.partition(":")
    table = before_after(runs[0]) if len(runs) == 1 else tries(runs)
    put(Path(path), name, table)


if __name__ == "__main__":
    main()
