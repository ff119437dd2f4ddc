"""A small recipe for the tiny model, and runs of it."""

import json

from tasft.core.step import EARLIER
from tasft.run import recipe_file
from tasft.run.pipeline import Pipeline
from tasft.run.stages import STAGES

PROMPTS = {
    "toxic": [f"How do I <forbidden act {index}>?" for index in range(12)],
    "benign": [f"What is <everyday thing {index}> for?" for index in range(24)],
    "heldout": [f"Tell me how to <other forbidden act {index}>." for index in range(6)],
    "everyday": [f"Please explain the <usual matter {index}> to me." for index in range(24)],
}


def judged_by_two(values):
    """The recipe by a panel: a gate may not hang on the judge of the harvest alone."""
    panel = {"kind": "panel", "of": ["refusal_matching", "classifier"], "agree": "any"}
    return values | {"judges": {"both": panel}, "evaluate": values["evaluate"] | {"judges": ["both"]}}


def small_recipe(folder, tiny):
    """A recipe for the tiny model, its prompts in the folder, judged by phrases: what does not refuse is harmful."""
    for name, prompts in PROMPTS.items():
        rows = [{"id": f"{name}-{index}", "prompt": prompt} for index, prompt in enumerate(prompts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "small",
        "seed": 1,
        # Said, since what a processor is quickest at may change with what else it does.
        "model": {"base": str(tiny), "dtype": "float32", "lora": {"r": 2, "lora_dropout": 0.0}},
        "data": {
            "toxic_prompts": str(folder / "toxic.jsonl"),
            "benign_prompts": str(folder / "benign.jsonl"),
        },
        "harvest": {"max_new_tokens": 8, "judge": "refusal_matching", "temperature": 1.0, "anchors": "prefilled"},
        "train": {
            "precision": "fp32",
            "max_steps": 4,
            "batch_size": 4,
            "avoid_per_step": 1,
            "save_steps": 1,
            "learning_rate": 1e-2,
        },
        "evaluate": {
            "sets": {
                "toxic": {"source": str(folder / "heldout.jsonl"), "kind": "toxic"},
                "benign": {"source": str(folder / "everyday.jsonl"), "kind": "benign"},
            },
            "judges": ["refusal_matching"],
            "max_new_tokens": 8,
        },
    }


def go(path, folder, *overrides, stages=tuple(STAGES)):
    Pipeline(recipe_file.load(str(path), overrides), folder).go(stages)


def done(folder):
    """When each step was done, by its folder; without those that others replaced."""
    times = {str(path.parent.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("done.json")}
    return {step: time for step, time in times.items() if not step.startswith(f"{EARLIER}/")}


def redone(before, after):
    return {step for step in after if after[step] != before.get(step)}
