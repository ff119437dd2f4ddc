"""Does one penalty weight serve any number of avoid rows? How hard the penalty pulls, for each normalisation.

The effective pull of a step is the norm of the gradient of the weighted penalty over that of the imitate loss. It is
taken at the untrained model (learning rate 0), on steps of rows as training would draw them, for growing numbers of
avoid rows beside the same imitate rows. `per_group` draws stratified steps, as by default, with the data's share of
avoid rows or always two; `shared` and `paper` uniform ones, as the paper does.

    tasft harvest demo --out runs/demo
    python research/pull.py runs/demo --json docs/results/pull.json --plot docs/pull.svg
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import set_seed

from tasft import TASFTConfig, TASFTTrainer
from tasft.data.rows import read_examples
from tasft.models.load import load_model, load_tokenizer

WAYS: dict[str, dict[str, Any]] = {
    "per_group": {"normalization": "per_group"},
    "per_group, 2 a step": {"normalization": "per_group", "avoid_per_step": 2},
    "shared": {"normalization": "shared", "sampling": "uniform"},
    "paper": {"normalization": "paper", "sampling": "uniform"},
}
STYLES = dict(
    zip(
        WAYS,
        (("#0072b2", "-", "o"), ("#56b4e9", ":", "D"), ("#d55e00", "--", "s"), ("#009e73", "-.", "^")),
        strict=True,
    )
)
BATCH = 8


def pulls(model: str, rows: list[Any], way: dict[str, Any], penalty: str, steps: int) -> list[float]:
    """The pull of each step that had rows of both kinds."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TASFTConfig(
            output_dir=folder,
            penalty=penalty,
            **way,
            log_term_gradients=True,
            learning_rate=0.0,
            max_steps=steps,
            logging_steps=1,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trainer = TASFTTrainer(
            load_model(model), arguments, rows, processing_class=load_tokenizer(model), peft_config=lora
        )
        trainer.train()
        logs = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    norms = [(log["penalty_grad_norm"], log["imitate_nll_grad_norm"]) for log in logs]
    return [penalty / imitate for penalty, imitate in norms if penalty and imitate]


def measure(run: Path, model: str, penalty: str, counts: list[int], steps: int) -> dict[str, Any]:
    avoid, imitate = (read_examples(str(run / "harvest" / f"{kind}.jsonl")) for kind in ("avoid", "imitate"))
    counts = [count for count in counts if count <= len(avoid)]
    rows = []
    for way, settings in WAYS.items():
        for count in counts:
            found = pulls(model, [*imitate, *avoid[:count]], settings, penalty, steps)
            row: dict[str, Any] = {"way": way, "avoid_rows": count, "steps_with_both": len(found)}
            if found:
                mean = sum(found) / len(found)
                spread = math.sqrt(sum((pull - mean) ** 2 for pull in found) / max(len(found) - 1, 1))
                row |= {"pull": mean, "standard_error": spread / math.sqrt(len(found))}
            rows.append(row)
            print(row, flush=True)
    setting = {"model": model, "penalty": penalty, "imitate_rows": len(imitate), "batch": BATCH, "steps": steps}
    return {"setting": setting, "rows": rows}


def growth(result: dict[str, Any]) -> dict[str, float]:
    """How many times as hard the most avoid rows pull as the fewest do."""
    found: dict[str, float] = {}
    for way in WAYS:
        pulls = [row["pull"] for row in result["rows"] if row["way"] == way and "pull" in row]
        found[way] = pulls[-1] / pulls[0]
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: pull and standard error, a row for each number of avoid rows."""
    counts = sorted({row["avoid_rows"] for row in result["rows"]})
    lines = ["| avoid rows | " + " | ".join(f"`{name}`" for name in WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    for count in counts:
        cells = []
        for name in WAYS:
            (row,) = [row for row in result["rows"] if (row["way"], row["avoid_rows"]) == (name, count)]
            shown = f"{row['pull']:.2f} ± {row['standard_error']:.2f}" if "pull" in row else "no step"
            cells.append(f"{shown} ({row['steps_with_both']})")
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tasft", "font.size": 9.5}):
        figure = Figure(figsize=(5.6, 3.6))
        axes = figure.add_axes((0.13, 0.15, 0.83, 0.8))
        for name, (color, dash, marker) in STYLES.items():
            rows = [row for row in result["rows"] if row["way"] == name and "pull" in row]
            x, y, error = ([row[key] for row in rows] for key in ("avoid_rows", "pull", "standard_error"))
            axes.errorbar(x, y, error, color=color, linestyle=dash, marker=marker, capsize=3, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"avoid rows, beside {result['setting']['imitate_rows']} to imitate")
        axes.set_ylabel("effective pull at weight 1")
        axes.grid(color="#dde2e8", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with a harvest")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--penalty", default="emd_hinge")
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    result = measure(arguments.run, arguments.model, arguments.penalty, arguments.counts, arguments.steps)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        draw(result, arguments.plot)
    print(table(result))


if __name__ == "__main__":
    main()
