"""What the penalty adds to anchors alone: paired runs on public prompts.

For each seed the demo's recipe is run twice on the same harvest, with its penalty and with `penalty: none` (the
same imitate rows in the same order), and both are asked the same prompts: I-MaliciousInstructions (100), the
first half of HarmfulQ (100) and every fourth safe prompt of XSTest (63). Written: rates of each run and paired
differences over prompts with 95% intervals, for each seed and with both seeds pooled.

    python research/control.py --data-dir DATA --out runs/control --json docs/results/control.json

DATA holds stl/I-MaliciousInstructions.json, stl/HarmfulQ.json and xstest/xstest_prompts.csv as published.
"""

import argparse
import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from tasft.core.stats import mean, paired_difference, rate
from tasft.run import recipe_file
from tasft.run.pipeline import Pipeline

ARMS = {"penalty": [], "none": ["train.penalty=none", "train.batch_size=6", "train.avoid_per_step=null"]}
SETS = {"toxic": "toxic", "benign": "benign"}
MEASURES = {
    "harmful": lambda verdict: verdict["harmful"],
    "refusal": lambda verdict: verdict["refusal"],
    "incoherent": lambda verdict: not verdict["coherent"],
    "safe_coherent": lambda verdict: not verdict["harmful"] and verdict["coherent"],
}


def write_prompts(data: Path, out: Path) -> None:
    malicious = json.loads((data / "stl" / "I-MaliciousInstructions.json").read_text())["instructions"]
    harmful = json.loads((data / "stl" / "HarmfulQ.json").read_text())[:100]
    with (data / "xstest" / "xstest_prompts.csv").open(newline="") as file:
        safe = [row["prompt"] for row in csv.DictReader(file) if row["label"] == "safe"][::4]
    for name, prompts in (("toxic", malicious + harmful), ("benign", safe)):
        rows = [{"id": f"{name}-{number}", "prompt": prompt} for number, prompt in enumerate(prompts)]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def verdicts(run: Path, name: str, state: str = "final") -> dict[str, dict]:
    path = run / "evaluate" / state / name / "embedded" / "verdicts.jsonl"
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def run_arm(out: Path, seed: int, arm: str, harvest_of: Path | None, overrides: list[str]) -> Path:
    folder = out / f"seed{seed}-{arm}"
    if harvest_of is not None and not folder.exists():
        shutil.copytree(harvest_of / "harvest", folder / "harvest")
        shutil.copy(harvest_of / "recipe.yaml", folder)
    sets = [
        value
        for name, kind in SETS.items()
        for value in (f"evaluate.sets.{name}.source={out / name}.jsonl", f"evaluate.sets.{name}.kind={kind}")
    ]
    spec = recipe_file.load("demo", [f"seed={seed}", "name=control", *sets, *overrides, *ARMS[arm]])
    run = Pipeline(spec, folder)
    run.go(("sft", "harvest", "train"))
    # The untouched model is the same for all: it answers once.
    states = {"base", "final"} if harvest_of is None else {"final"}
    for step in run.steps("evaluate"):
        if states & set(step.folder.relative_to(folder).parts) and not step.is_done:
            step.run()
    return folder


def table(result: dict, seeds: list[int]) -> str:
    """Markdown: rates of both arms and their paired difference, in percent."""

    def cell(estimate: dict, sign: str = "") -> str:
        value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
        return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"

    head = "| prompts | measure | seed | untouched | anchors alone | with the penalty | difference |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for name in SETS:
        for measure in MEASURES:
            for seed in seeds:
                none, penalty = (result["rates"][f"{name} {measure} {arm} seed {seed}"] for arm in ("none", "penalty"))
                difference = result["penalty_minus_none"][f"{name} {measure} seed {seed}"]
                untouched = cell(result["rates"][f"{name} {measure} base"]) if seed == seeds[0] else ""
                shown = f"{untouched} | {cell(none)} | {cell(penalty)} | {cell(difference, '+')}"
                rows.append(f"| {name}, {none['n']} | {measure.replace('_', ' and ')} | {seed} | {shown} |")
            pooled = result["penalty_minus_none"][f"{name} {measure} pooled"]
            label = f"| {name}, {pooled['n']} | **{measure.replace('_', ' and ')}** | pooled | | | |"
            rows.append(f"{label} **{cell(pooled, '+')}** |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only-read", action="store_true", help="summarise runs that are done")
    parser.add_argument("overrides", nargs="*", help="fields of the demo's recipe to override in both arms")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_prompts(arguments.data_dir, arguments.out)
    runs: dict[tuple[int, str], Path] = {}
    for seed in arguments.seeds:
        first = None
        for arm in ARMS:
            if arguments.only_read:
                runs[seed, arm] = arguments.out / f"seed{seed}-{arm}"
            else:
                runs[seed, arm] = run_arm(arguments.out, seed, arm, first, arguments.overrides)
            first = first or runs[seed, arm]
    result = {"judge": "embedded", "overrides": arguments.overrides, "rates": {}, "penalty_minus_none": {}}
    one = runs[arguments.seeds[0], "penalty"]
    summary = json.loads((one / "evaluate" / "final" / "toxic" / "embedded" / "summary.json").read_text())
    result |= {"commit": summary["commit"], "recipe": summary["recipe"]}
    for name in SETS:
        for measure, outcome in MEASURES.items():
            before = [bool(outcome(row)) for row in verdicts(one, name, "base").values() if row["harmful"] is not None]
            result["rates"][f"{name} {measure} base"] = asdict(rate(before))
            # Seeds share their prompts: pooled, a prompt counts once, with its mean over the seeds.
            pooled: dict[str, dict[str, list[bool]]] = {arm: {} for arm in ARMS}
            for seed in arguments.seeds:
                found = {arm: verdicts(runs[seed, arm], name) for arm in ARMS}
                shared = [key for key in found["none"] if all(found[arm][key]["harmful"] is not None for arm in ARMS)]
                values = {arm: [bool(outcome(found[arm][key])) for key in shared] for arm in ARMS}
                for arm in ARMS:
                    for key, value in zip(shared, values[arm], strict=True):
                        pooled[arm].setdefault(key, []).append(value)
                    result["rates"][f"{name} {measure} {arm} seed {seed}"] = asdict(rate(values[arm]))
                result["penalty_minus_none"][f"{name} {measure} seed {seed}"] = asdict(
                    paired_difference(values["none"], values["penalty"])
                )
            means = {arm: [sum(values) / len(values) for values in pooled[arm].values()] for arm in ARMS}
            result["penalty_minus_none"][f"{name} {measure} pooled"] = asdict(
                mean([penalty - none for none, penalty in zip(means["none"], means["penalty"], strict=True)])
            )
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result, arguments.seeds))


if __name__ == "__main__":
    main()
