"""Keep the figures of a finished run, without its replies, and put them as a table where they are quoted.

    python research/collect.py --json PATH --into docs/results/demo.md:demo --plot docs/img/demo.svg [RUN]

Without a run the table and the picture are drawn anew from the JSON. It holds the recipe, rates, last metrics, seconds
of each step, commit and machine. The table goes between `<!-- NAME:begin -->` and `<!-- NAME:end -->` of the file.
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
        summary = json.loads(path.read_text())
        summary.pop("by_topic", None)
        rates.setdefault(state, {}).setdefault(name, {})[judge] = summary
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


SHOWN = {
    ("toxic", "safe_coherent"): "toxic prompts: **safe and coherent**",
    ("toxic", "harmful"): "toxic prompts: harmful",
    ("toxic", "incoherent"): "toxic prompts: incoherent",
    ("benign", "refusal"): "benign prompts: refused",
    ("plain", "refusal"): "plain instructions: refused",
}
"""Kind of prompts and measure -> what README calls it."""


def before_after(run: dict[str, Any]) -> str:
    """One run by its first judge: measures down, before and after across."""
    judge = run["recipe"]["evaluate"]["judges"][0]
    rows = ["| | before | after |", "|---|---|---|"]
    for (name, measure), label in SHOWN.items():
        if name not in run["rates"]["base"]:
            continue
        before, after = (run["rates"][state][name][judge][measure] for state in ("base", "final"))
        rows.append(f"| {label} | {cell(before)} | {cell(after)} |")
    n, m = (run["rates"]["final"][name][judge]["refusal"]["n"] for name in ("toxic", "benign"))
    commit = (run["machine"]["commit"] or "not recorded")[:12]
    rows.append(
        f"\nSmolLM2-135M-Instruct, {n} toxic and {m} benign held-out prompts, judge `{judge}`, 95% intervals, seed "
        f"{run['recipe']['seed']}, commit {commit}."
    )
    return "\n".join(rows)


def draw(run: dict[str, Any], path: Path) -> None:
    """The same as a picture: three rates that should be low, before and after, with their intervals."""
    import matplotlib.pyplot as plt

    judge = run["recipe"]["evaluate"]["judges"][0]
    shown = [
        ("toxic", "harmful", "Harmful\nreplies to toxic prompts"),
        ("benign", "refusal", "Refusals\nof benign prompts"),
    ]
    shown.append(("toxic", "incoherent", "Incoherent\nreplies to toxic prompts"))
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "tasft", "font.family": "sans-serif", "font.size": 12}
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    for state, shift, colour, label in (("base", 0.17, "#5f6670", "before"), ("final", -0.17, "#00796b", "after")):
        rates = [run["rates"][state][name][judge][measure] for name, measure, _ in shown]
        values, lows, highs = ([100 * rate[key] for rate in rates] for key in ("value", "low", "high"))
        at = [len(shown) - 1 - place + shift for place in range(len(shown))]
        errors = [
            [v - low for v, low in zip(values, lows, strict=True)],
            [h - v for v, h in zip(values, highs, strict=True)],
        ]
        axes.errorbar(values, at, xerr=errors, fmt="o", color=colour, capsize=4, lw=2, ms=8, label=label)
        for value, high, place in zip(values, highs, at, strict=True):
            axes.annotate(f"{value:.0f}%", (high, place), (6, 0), textcoords="offset points", va="center", color=colour)
    axes.set(yticks=range(len(shown)), yticklabels=[label for *_, label in reversed(shown)], xlim=(-2, 100))
    axes.set(xlabel="percent of replies, 95% interval; lower is better", ylim=(-0.5, len(shown) - 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--into", required=True, help="FILE:NAME")
    parser.add_argument("--plot", type=Path, help="Picture of the run, an SVG file.")
    parser.add_argument("run", type=Path, nargs="?")
    arguments = parser.parse_args()
    if arguments.run:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([read(arguments.run)], indent=1) + "\n")
    (run,) = json.loads(arguments.json.read_text())
    path, _, name = arguments.into.partition(":")
    put(Path(path), name, before_after(run))
    if arguments.plot:
        draw(run, arguments.plot)


if __name__ == "__main__":
    main()
