"""What a run will do, before it is begun: rows, replies, steps, and the memory that training holds."""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from rich.table import Table

from tasft.core.text import visible
from tasft.harvest.anchors import FLIP_PROMPTS
from tasft.judges import calibration
from tasft.models.load import add_lora
from tasft.run.checks import check_inputs
from tasft.run.pipeline import Pipeline
from tasft.run.stages import STAGES
from tasft.train.settings import Training

GIB = 2**30


def plan(run: Pipeline, stages: Sequence[str] = tuple(STAGES)) -> dict[str, Any]:
    """What the stages will do; reads what `tasft check` reads and writes nothing.

    Returns:
        `recipe`, resolved; `rows` of each source; `model` with its `parameters` and `training_gib`: its weights, with
        the gradients and moments of AdamW, None where weights are quantised; `stages`, each with `state` and what there
        is to do in words.

    Raises:
        UserError: A fault of recipe or data.
    """
    check_inputs(run.inputs)
    spec, states = run.spec, _states(run)
    return {
        "name": spec.name,
        "folder": str(run.folder),
        "recipe": spec.model_dump(),
        "rows": _rows(run),
        "model": _size(run),
        "stages": [{"stage": stage, "state": states[stage], "work": _work(run, stage)} for stage in stages],
    }


def _rows(run: Pipeline) -> dict[str, int]:
    inputs, data = run.inputs, run.spec.data
    counts = {
        "data.imitate": len(inputs.imitate) if data.imitate else None,
        "data.toxic_prompts": len(inputs.toxic) if data.toxic_prompts else None,
        "data.benign_prompts": len(inputs.benign) if data.benign_prompts else None,
        "data.safe_responses": len(inputs.safe) if data.safe_responses else None,
        **{f"evaluate.sets.{name}": _asked(run, name) for name in inputs.sets},
    }
    return {field: count for field, count in counts.items() if count is not None}


def _asked(run: Pipeline, name: str) -> int:
    return min(len(run.inputs.sets[name]), run.spec.evaluate.limit or len(run.inputs.sets[name]))


def _states(run: Pipeline) -> dict[str, str]:
    """Of each stage whether it is done. What a stage depends on is known when the one before it is done."""
    states = dict.fromkeys(STAGES, "to do")
    for stage in STAGES:
        steps = list(run.steps(stage))
        for step in steps:
            # A later step may read what this one writes.
            if not step.is_done:
                if changed := step.outdated_by:
                    states[stage] = f"done; would be redone: {', '.join(changed)}"
                elif (step.folder / "begun.json").exists():
                    states[stage] = "begun"
                return states
        states[stage] = "done" if steps else "not asked for"
    return states


def _work(run: Pipeline, stage: str) -> str:
    spec = run.spec
    if stage == "sft":
        if spec.sft is None:
            return "none"
        return _training(spec.sft, _steps(spec.sft, len(run.inputs.imitate)), most=False)
    if stage == "harvest":
        return _harvest(run)
    if stage == "train":
        imitate, avoid, most = _trained_on(run)
        train = spec.train.heeded()
        # Avoid rows come beside imitate rows, as many in each step as the recipe says, or in the share of the data.
        total, size = (
            (imitate, train.batch_size - train.avoid_per_step) if train.avoid_per_step else (imitate + avoid, None)
        )
        return _training(train, _steps(train, total, size), most and train.max_steps is None) + _looks(run)
    if stage == "evaluate":
        return _evaluate(run)
    return "a page, Markdown, a model card, a table"


def _steps(spec: Training, rows: int, size: int | None = None) -> int:
    return spec.max_steps or (spec.epochs or 1) * math.ceil(rows / (size or spec.batch_size))


def _training(spec: Training, steps: int, most: bool) -> str:
    return f"{'at most ' if most else ''}{steps} steps of {spec.batch_size} rows"


def _trained_on(run: Pipeline) -> tuple[int, int, bool]:
    """Rows to imitate, rows to avoid, and whether the harvest may give fewer."""
    spec, inputs = run.spec, run.inputs
    imitate, avoid = len(inputs.imitate) + len(inputs.safe), 0
    if not spec.harvests or spec.harvest is None:
        return imitate, avoid, False
    harvest = spec.harvest
    answers = len(inputs.toxic) * harvest.samples
    avoid = min(harvest.rows, answers)
    imitate += len(inputs.benign) if harvest.self_imitate else 0
    if harvest.anchors != "none":
        anchors = answers if harvest.anchors == "own" else len(inputs.toxic)
        imitate += min(anchors, harvest.anchor_rows or anchors)
    if harvest.contrastive:
        imitate += harvest.contrastive.words * harvest.contrastive.per_word
    return imitate, avoid, True


def _looks(run: Pipeline) -> str:
    """What is asked between rounds."""
    rounds, harvest = run.spec.train.heeded().rounds, run.spec.harvest
    if rounds is None or harvest is None:
        return ""
    toxic, benign = len(run.inputs.toxic), min(rounds.benign, len(run.inputs.benign))
    return f" in {rounds.count} rounds; {rounds.count - 1} looks at {toxic} toxic and {benign} benign replies"


def _harvest(run: Pipeline) -> str:
    spec, inputs = run.spec.harvest, run.inputs
    words = []
    if calibration.can_calibrate(inputs.benign):
        count = min(calibration.PROMPTS, len(inputs.benign))
        words.append(f"{count} replies to calibrate coherence")
    if spec is not None and run.spec.harvests:
        counts = {"toxic": len(inputs.toxic) * spec.samples}
        if spec.self_imitate:
            counts["benign"] = len(inputs.benign)
        if spec.anchors == "prefilled":
            counts["refusing"] = len(inputs.toxic)
        if spec.anchors == "instructed":
            tried = min(FLIP_PROMPTS, len(inputs.toxic))
            counts["instructed"] = len(spec.instructions) * tried + len(inputs.toxic) - tried
        amounts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        words.append(f"at most {amounts} replies of at most {spec.max_new_tokens} tokens")
        if spec.contrastive:
            words.append(f"{spec.contrastive.words * spec.contrastive.per_word} prompts that seem toxic")
        if spec.engine is not None:
            words.append("by a server")
    return "; ".join(words) or "none"


def _evaluate(run: Pipeline) -> str:
    spec = run.spec.evaluate
    states = 3 if run.spec.sft else 2
    if spec.checkpoints:
        imitate, avoid, _ = _trained_on(run)
        states += max(0, math.ceil(_steps(run.spec.train, imitate + avoid) / run.spec.train.save_steps) - 1)
    count = sum(_asked(run, name) for name in spec.sets)
    words = [f"{states} states of the model, {count} replies each of at most {spec.max_new_tokens} tokens"]
    words += [f"judged by {', '.join(spec.judges)}"]
    words += [what for what in ("capability", "quality", "jailbreak") if getattr(spec, what)]
    return "; ".join(words)


def _size(run: Pipeline) -> dict[str, Any]:
    """Parameters, and GiB of weights, gradients and AdamW's two moments in float32; without loading a weight."""
    spec, model = run.spec.model, deepcopy(run.inputs.sketch)
    parameters = model.num_parameters()
    width = torch.finfo(getattr(torch, spec.dtype)).bits // 8
    held = parameters * (2 * width + 8)
    if spec.lora:
        adapted = add_lora(model, **spec.lora.model_dump())
        held = parameters * width + 16 * adapted.num_parameters(only_trainable=True)
    return {"parameters": parameters, "training_gib": None if spec.quantize != "none" else round(held / GIB, 2)}


def table(found: dict[str, Any]) -> Table:
    """The stages of a plan, for a terminal."""
    drawn = Table()
    for head in ("stage", "state", "what"):
        drawn.add_column(head)
    for row in found["stages"]:
        drawn.add_row(*map(visible, (row["stage"], row["state"], row["work"])))
    return drawn
