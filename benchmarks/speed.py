"""What a CPU is quick at, in one command: generation, training steps and the stages of the demo.

    python benchmarks/speed.py --out benchmarks/results/speed    # on a quiet machine, about 40 minutes on 2 cores
    python benchmarks/speed.py --out /tmp/speed --quick

Generation and steps are measured in float32 and, where that is what `model.dtype: auto` chooses here, in bfloat16; the
demo runs as it ships. A part that fails or takes too long loses nothing of the others.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import generate
import step
import torch
from environment import markdown
from parts import PYTHON, Part, go

from tasft.models.precision import fastest
from tasft.run import recipe_file
from tasft.run.pipeline import Pipeline

STEPPING = ("trl_sft", "tasft_none", "tasft_emd", "tasft_nlcl", "tasft_npo")


def parts(quick: bool, dtype: str) -> dict[str, Part]:
    """What is measured, in order."""
    found: dict[str, Part] = {}
    small = ("--quick", "--rounds", "1") if quick else ()
    for each in dict.fromkeys(("float32", dtype)):
        replies = (PYTHON, "benchmarks/generate.py", "--json", "{json}", "--dtype", each, *small)
        steps = (PYTHON, "benchmarks/step.py", "--json", "{json}", "--dtype", each, *small, "--only")
        who = ("tasft_none",) if quick else STEPPING
        found[f"generate-{each}"] = Part(f"Replies, {each}", replies, 1800, generate.table)
        found[f"step-{each}"] = Part(f"Steps, {each}", (*steps, *who), 1800, step.table)
    demo = (PYTHON, "benchmarks/speed.py", "--stages", "{json}", "try" if quick else "demo")
    found["demo"] = Part("Stages of the demo", demo, 1800, stages)
    return found


def run(path: Path, recipe: str) -> None:
    """Run a recipe in a folder that is thrown away; its precision, and the seconds of each step."""
    with tempfile.TemporaryDirectory() as folder:
        Pipeline(recipe_file.load(recipe), Path(folder) / recipe).go()
        manifest = json.loads((Path(folder) / recipe / "manifest.json").read_text())
    path.write_text(json.dumps({name: manifest[name] for name in ("stages", "precision")}) + "\n")


def stages(found: dict[str, Any]) -> str:
    """Seconds of each step as a table, those of all together last."""
    seconds = {name: about["seconds"] for name, about in found["stages"].items()}
    lines = [("step", "seconds"), ("---", "--:"), *((name, f"{each:g}") for name, each in seconds.items())]
    lines.append(("together", f"{sum(seconds.values()):.1f}"))
    return markdown(lines, "{dtype}: {why}.".format_map(found["precision"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="STEM", help="writes STEM.json and STEM.md")
    what.add_argument("--stages", nargs=2, metavar=("PATH", "RECIPE"), help="only run a recipe, its seconds to PATH")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and the recipe try, a few minutes")
    args = parser.parse_args()
    if args.stages:
        run(Path(args.stages[0]), args.stages[1])
        return
    choice = fastest()
    go("Measured on a CPU", parts(args.quick, choice.dtype), args.out, "cpu", choice.dtype, torch.get_num_threads())


if __name__ == "__main__":
    main()
