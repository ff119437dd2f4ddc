"""What a run will take, before it is begun: rows, replies, steps, and estimates of time and memory."""

import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from tasft.core.text import visible
from tasft.data.encode import encode_rows
from tasft.data.template import encode_prompt
from tasft.harvest.anchors import FLIP_PROMPTS, USED
from tasft.judges import calibration
from tasft.models.load import add_lora, locate
from tasft.run import training
from tasft.run.checks import check_inputs
from tasft.run.pipeline import Pipeline
from tasft.run.recipe import Model
from tasft.run.stages import STAGES
from tasft.train.settings import Training

RULE = (
    "Estimates, not promises. Time: a training step and the writing of a token were timed here on one and on three "
    "layers of this model's shape, with weights of no meaning and with whatever else this machine was doing, and "
    "carried on to all layers; every reply is taken to be as long as it may be. Loading the model, judging, attacks, "
    "lm-eval, quality and checkpoints are not in it. Memory: weights, what such layers save for the backward pass, and "
    "what the optimizer holds; not what the libraries take for themselves."
)
SAMPLE = 200  # Rows whose lengths are looked at.
FEW, MORE = 1, 3  # Layers that are timed.
HEAD_ROWS = 64  # Positions at which the output head is timed.
DECODED = 4  # Tokens that are timed.
TOGETHER = 64  # Replies that the engine draws together.
LARGEST_ON_CPU = 3e9  # Parameters; of more, even three layers take minutes.
GIB = 2**30


def plan(run: Pipeline, stages: Sequence[str] = tuple(STAGES)) -> dict[str, Any]:
    """What the stages will do; reads what `tasft check` reads and writes nothing.

    Returns:
        `recipe`, resolved; `rows` of each source; `model` with its parameters; `stages`, each with `state`, what there
        is to do in words, and `seconds`, None where it is not estimated; `memory_gib` of training, or None; `rule` that
        the estimates follow, or `not_estimated`, why there are none.

    Raises:
        UserError: A fault of recipe or data.
    """
    check_inputs(run.inputs)
    spec = run.spec
    config, parameters = _shape(spec.model.base, spec.model.trust_remote_code)
    found: dict[str, Any] = {
        "name": spec.name,
        "folder": str(run.folder),
        "recipe": spec.model_dump(),
        "rows": _rows(run),
        "model": {"parameters": parameters},
    }
    why = None
    if spec.model.quantize != "none":
        why = "not estimated for quantised weights"
    elif not torch.cuda.is_available() and parameters > LARGEST_ON_CPU:
        why = f"not estimated: {parameters / 1e9:.1f} billion parameters, and no GPU here"
    tables, memory = [], []
    states = _states(run)
    for stage in stages:
        work, pieces = _work(run, stage)
        seconds = None
        if states[stage] == "done":
            seconds = 0.0
        elif why is None:
            costs = [each(config) for each in pieces]
            seconds = sum(taken for taken, _ in costs)
            memory += [saved for _, saved in costs if saved]
        tables.append({"stage": stage, "state": states[stage], "work": work, "seconds": seconds})
    found["stages"] = tables
    found["memory_gib"] = None if why or not memory else round((max(memory) + _held(run, config, parameters)) / GIB, 2)
    return found | ({"not_estimated": why} if why else {"rule": RULE})


def plan_sweep(groups: Sequence[Sequence[Pipeline]]) -> dict[str, Any]:
    """About what cells of a sweep will take that are not done; what groups have in common counts in each of them.

    Args:
        groups: Cells that share what comes before training, the one that draws most first.

    Returns:
        `groups`, each the `plan` of its first cell with `cells` and `seconds`: that cell, and of each other one the
        training and the evaluation of what was trained, taken to be those of the last. `seconds` of all, one after the
        other, and `memory_gib`, the most; None where it is not estimated.

    Raises:
        UserError: As in `plan`.
    """
    found = []
    for group in groups:
        first = plan(group[0])
        taken = [row["seconds"] for row in first["stages"]]
        seconds = None if None in taken else sum(taken)
        if seconds is not None and len(group) > 1:
            train, evaluate = (row["seconds"] for row in plan(group[-1], ("train", "evaluate"))["stages"])
            before, after = _evaluated(group[-1])
            seconds += (len(group) - 1) * (train + evaluate * after / (before + after))
        found.append(first | {"cells": len(group), "seconds": seconds})
    known = [each["seconds"] for each in found if each["seconds"] is not None]
    memory = [each["memory_gib"] for each in found if each["memory_gib"] is not None]
    return {
        "groups": found,
        "seconds": sum(known) if len(known) == len(found) else None,
        "memory_gib": max(memory, default=None),
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
    found = dict.fromkeys(STAGES, "to do")
    for stage in STAGES:
        for step in run.steps(stage):
            # A later step may read what this one writes.
            if not step.is_done:
                if changed := step.outdated_by:
                    found[stage] = f"done; would be redone: {', '.join(changed)}"
                elif (step.folder / "begun.json").exists():
                    found[stage] = "begun"
                return found
        found[stage] = "done"
    return found


Piece = Callable[[PreTrainedConfig], tuple[float, float]]
"""Of the model's shape: seconds, and bytes that are saved for a backward pass."""


def _work(run: Pipeline, stage: str) -> tuple[str, list[Piece]]:
    spec = run.spec
    if stage == "sft":
        if spec.sft is None:
            return "none", []
        steps = _steps(spec.sft, len(run.inputs.imitate))
        return _training_words(spec.sft, steps, most=False), [_training(run, spec.sft, steps)]
    if stage == "harvest":
        return _harvest(run)
    if stage == "train":
        imitate, avoid, most = _trained_on(run)
        train = spec.train
        # Avoid rows come beside imitate rows, as many in each step as the recipe says, or in the share of the data.
        total, size = (
            (imitate, train.batch_size - train.avoid_per_step) if train.avoid_per_step else (imitate + avoid, None)
        )
        steps = _steps(train, total, size)
        words, pieces = _training_words(train, steps, most and train.max_steps is None), [_training(run, train, steps)]
        looked, looks = _looks(run)
        return words + looked, pieces + looks
    if stage == "evaluate":
        return _evaluate(run)
    return "a page, Markdown, a model card, a table", []


def _steps(spec: Training, rows: int, size: int | None = None) -> int:
    return spec.max_steps or (spec.epochs or 1) * math.ceil(rows / (size or spec.batch_size))


def _training_words(spec: Training, steps: int, most: bool) -> str:
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


def _looks(run: Pipeline) -> tuple[str, list[Piece]]:
    """What is asked between rounds."""
    rounds, harvest = run.spec.train.rounds, run.spec.harvest
    if rounds is None or harvest is None:
        return "", []
    times, toxic, benign = rounds.count - 1, len(run.inputs.toxic), min(rounds.benign, len(run.inputs.benign))
    pieces = [
        _writing(run, times * toxic, harvest.max_new_tokens),
        _writing(run, times * benign, rounds.max_new_tokens),
    ]
    return f" in {rounds.count} rounds; {times} looks at {toxic} toxic and {benign} benign replies", pieces


def _harvest(run: Pipeline) -> tuple[str, list[Piece]]:
    spec, inputs = run.spec.harvest, run.inputs
    words, pieces = [], []
    if calibration.can_calibrate(inputs.benign):
        count = min(calibration.PROMPTS, len(inputs.benign))
        words.append(f"{count} replies to calibrate coherence")
        pieces.append(_writing(run, count, calibration.LONGEST))
    if spec is not None and run.spec.harvests:
        counts = {"toxic": len(inputs.toxic) * spec.samples}
        if spec.self_imitate:
            counts["benign"] = len(inputs.benign)
        if spec.anchors == "prefilled":
            counts["refusing"] = len(inputs.toxic)
        if spec.anchors == "instructed":
            tried = min(FLIP_PROMPTS, len(inputs.toxic))
            counts["instructed"] = len(spec.instructions) * tried + USED * (len(inputs.toxic) - tried)
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        words.append(f"at most {said} replies of at most {spec.max_new_tokens} tokens")
        if spec.contrastive:
            words.append(
                f"{spec.contrastive.words * spec.contrastive.per_word} prompts that seem toxic (not in the time)"
            )
        if spec.engine is None:
            pieces.append(_writing(run, sum(counts.values()), spec.max_new_tokens))
        else:
            words.append("by a server (not in the time)")
    return "; ".join(words) or "none", pieces


def _evaluated(run: Pipeline) -> tuple[int, int]:
    """States of the model that are evaluated: before the training, and of it."""
    after = 1
    if run.spec.evaluate.checkpoints:
        imitate, avoid, _ = _trained_on(run)
        after += max(0, math.ceil(_steps(run.spec.train, imitate + avoid) / run.spec.train.save_steps) - 1)
    return (2 if run.spec.sft else 1), after


def _evaluate(run: Pipeline) -> tuple[str, list[Piece]]:
    spec = run.spec.evaluate
    states = sum(_evaluated(run))
    count = sum(_asked(run, name) for name in spec.sets)
    words = [f"{states} states of the model, {count} replies each of at most {spec.max_new_tokens} tokens"]
    words += [f"judged by {', '.join(spec.judges)}"]
    words += [f"{what} (not in the time)" for what in ("capability", "quality", "jailbreak") if getattr(spec, what)]
    return "; ".join(words), [_writing(run, states * count, spec.max_new_tokens)]


# Time and memory -------------------------------------------------------------------------------------------------


def _shape(base: str, trust_remote_code: bool) -> tuple[PreTrainedConfig, int]:
    """The model's configuration and its parameters, without a weight."""
    place = locate(base, trust_remote_code)
    config = AutoConfig.from_pretrained(place.name, trust_remote_code=trust_remote_code, **place.arguments())
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return config, empty.num_parameters()


def _built(spec: Model, config: PreTrainedConfig, layers: int) -> PreTrainedModel:
    """So many layers of the model; drawing weights at random would take longer than what is timed."""
    short = type(config)(**config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(
            short, dtype=getattr(torch, spec.dtype), trust_remote_code=spec.trust_remote_code
        )
    made = made.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.fill_(0.01)
        for module in made.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq.fill_(0.5)
    return made


def _timed(work: Callable[[], object]) -> float:
    """Seconds of the quicker of two, after one to warm up."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _whole(few: float, more: float, layers: int) -> float:
    """From what few and more layers cost to what all cost."""
    return max(0.0, few + (layers - FEW) * (more - few) / (MORE - FEW))


def _writing(run: Pipeline, replies: int, tokens: int) -> Piece:
    """The writing of replies, all of the longest length."""

    def piece(config: PreTrainedConfig) -> tuple[float, float]:
        if not replies:
            return 0.0, 0.0
        spec = run.spec.model
        together = min(TOGETHER, replies)
        lengths = _prompt_lengths(run)
        width = round(sum(lengths) / len(lengths))
        seconds = []
        for layers in (FEW, MORE):
            made = _built(spec, config, layers).eval()
            ids = torch.full((together, width), 5, device=made.device)

            def begin(made: PreTrainedModel = made, ids: torch.Tensor = ids) -> DynamicCache:
                with torch.inference_mode():
                    return made(
                        input_ids=ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1
                    ).past_key_values

            cache = begin()

            def go_on(made: PreTrainedModel = made, ids: torch.Tensor = ids, cache: DynamicCache = cache) -> None:
                with torch.inference_mode():
                    for _ in range(DECODED):
                        made(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)

            seconds.append((_timed(begin), _timed(go_on) / DECODED))
        layers = config.get_text_config().num_hidden_layers
        first, other = (_whole(few, more, layers) for few, more in zip(*seconds, strict=True))
        return math.ceil(replies / together) * (first + tokens * other), 0.0

    return piece


def _training(run: Pipeline, spec: Training, steps: int) -> Piece:
    """A training, with its adapter; loss and penalty as one pass of the output head."""

    def piece(config: PreTrainedConfig) -> tuple[float, float]:
        mean, longest = _lengths(run, spec)
        micro = spec.micro_batch_size or spec.batch_size
        seconds, saved, head = [], [], 0.0
        for layers in (FEW, MORE):
            made = _built(run.spec.model, config, layers)
            lora = run.spec.model.lora
            adapted = add_lora(made, **lora.model_dump()) if lora else made
            adapted.train()
            ids = torch.full((micro, mean), 5, device=made.device)

            def once(made: Any = made, ids: torch.Tensor = ids) -> None:
                made.base_model(input_ids=ids).last_hidden_state.float().pow(2).mean().backward()

            seconds.append(_timed(once))
            saved.append(_saved(once) * longest / mean)
            head = _timed(partial(_through_head, made.get_output_embeddings().weight.detach())) / HEAD_ROWS
        layers = config.get_text_config().num_hidden_layers
        one = _whole(seconds[0], seconds[1], layers) + head * micro * mean
        return steps * (spec.batch_size // micro) * one, _whole(saved[0], saved[1], layers)

    return piece


def _through_head(weight: torch.Tensor) -> None:
    states = torch.ones(HEAD_ROWS, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    (states @ weight.T).float().logsumexp(-1).sum().backward()  # type: ignore[no-untyped-call]


def _saved(work: Callable[[], object]) -> float:
    """Bytes that autograd keeps for the backward pass, without parameters."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.grad_fn is not None:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return float(sum(found.values()))


def _lengths(run: Pipeline, spec: Training) -> tuple[int, int]:
    """Mean and longest row in tokens; harvested replies are taken to be as long as they may be."""
    rows = [*run.inputs.imitate, *run.inputs.safe]
    lengths: list[int] = []
    if rows:
        train = run.spec.train.model_copy(update={"max_length": spec.max_length, "overlong": "truncate"})
        some = random.Random(0).sample(rows, min(SAMPLE, len(rows)))
        encoded, _ = encode_rows(some, run.inputs.tokenizer, training.arguments(run.spec, train, run.folder).encoding())
        lengths = [len(row["input_ids"]) for row in encoded]
    elif run.spec.harvest:
        lengths = [length + run.spec.harvest.max_new_tokens for length in _prompt_lengths(run)]
    lengths = lengths or [spec.max_length]
    return max(1, round(sum(lengths) / len(lengths))), min(max(lengths), spec.max_length)


def _prompt_lengths(run: Pipeline) -> list[int]:
    """Tokens of some of the prompts that are asked."""
    spec, inputs = run.spec.model, run.inputs
    prompts = [*inputs.toxic, *inputs.benign, *(prompt for prompts in inputs.sets.values() for prompt in prompts)]
    some = random.Random(0).sample(prompts, min(SAMPLE, len(prompts)))
    extra = spec.chat_template_kwargs
    return [len(encode_prompt(inputs.tokenizer, each.prompt, spec.prompt, chat_template_kwargs=extra)) for each in some]


def _held(run: Pipeline, config: PreTrainedConfig, parameters: int) -> float:
    """Bytes of weights, gradients and AdamW's two moments in float32."""
    spec = run.spec.model
    width = torch.finfo(getattr(torch, spec.dtype)).bits // 8
    if spec.lora is None:
        return parameters * (2 * width + 8)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
        made = add_lora(empty, **spec.lora.model_dump())
    trained = sum(tensor.numel() for tensor in made.parameters() if tensor.requires_grad)
    return parameters * width + trained * 16


def table(found: dict[str, Any]) -> Table:
    """The stages of a plan, for a terminal."""
    drawn = Table()
    for head in ("stage", "state", "what", "about"):
        drawn.add_column(head)
    for row in found["stages"]:
        about = "not estimated" if row["seconds"] is None else spoken(row["seconds"])
        drawn.add_row(*map(visible, (row["stage"], row["state"], row["work"], about)))
    return drawn


def spoken(seconds: float) -> str:
    """A time as one says it: no more digits than an estimate has."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
