"""One training of a run: from settings in a recipe to weights in a folder."""

import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
)

from tasft.core import provenance, ranks
from tasft.core.errors import UserError
from tasft.data.rows import Example
from tasft.models.engine import Sampling, requests_for
from tasft.run.context import Context
from tasft.run.recipe import Recipe
from tasft.train.baselines import BETA, kto_trainer
from tasft.train.callbacks import _Bar, _InOrder, _Stop
from tasft.train.checkpoints import _last_checkpoint
from tasft.train.config import OWN, TASFTConfig
from tasft.train.monitor import CollapseMonitor
from tasft.train.settings import Train
from tasft.train.trainer import TASFTTrainer


def _common(recipe: Recipe, spec: Train, folder: Path) -> dict[str, Any]:
    """What any trainer is told.

    Raises:
        UserError: The rows of a step cannot be shared evenly between the processes.
    """
    processes = ranks.world_size()
    share = max(1, spec.batch_size // processes)
    micro = min(spec.micro_batch_size or share, share)
    if spec.batch_size % (micro * processes):
        raise UserError(
            f"batch_size {spec.batch_size} is not a multiple of {micro} rows in each of {processes} processes: "
            "change batch_size, micro_batch_size or -n"
        )
    return {
        "output_dir": str(folder),
        "bf16": spec.precision == "bf16",
        # Without being told, transformers takes a machine without a GPU for one that cannot do it.
        "use_cpu": spec.precision == "bf16" and not torch.accelerator.is_available(),
        "fp16": spec.precision == "fp16",
        "activation_checkpointing": spec.activation_checkpointing,
        "num_train_epochs": spec.epochs or 1,
        "max_steps": spec.max_steps or -1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": spec.batch_size // (micro * processes),
        # All of them are used: a term without rows is a zero that reaches every parameter.
        "ddp_find_unused_parameters": False,
        "learning_rate": spec.learning_rate,
        "warmup_steps": spec.warmup_steps,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "logging_steps": 5,
        "logging_first_step": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_steps": spec.save_steps,
        "save_total_limit": None if recipe.evaluate.checkpoints and folder.name == "train" else 1,
        "seed": recipe.seed,
        "report_to": spec.report_to or "none",
        "run_name": f"{recipe.name}-{folder.name}",
    }


def arguments(recipe: Recipe, spec: Train, folder: Path) -> TASFTConfig:
    """What our trainer is told.

    Raises:
        UserError: The rows of a step cannot be shared evenly between the processes.
    """
    handed = {name: getattr(spec, name) for name in OWN & Train.model_fields.keys()}
    return TASFTConfig(
        **_common(recipe, spec, folder),
        **handed
        | {
            "penalty": spec.penalty if spec.method == "tasft" else "none",
            "own_penalty": spec.own_penalty and spec.own_penalty.model_dump(),
        },
        untouched=spec.rounds is not None,
        prompt_format=recipe.model.prompt,
        chat_template_kwargs=recipe.model.chat_template_kwargs,
    )


def train(
    context: Context, spec: Train, rows: list[Example], folder: Path, before: Path | None = None, number: int = 1
) -> None:
    """One training of a run, into `folder/adapter` or `folder/model`.

    Args:
        context: What the run is given.
        spec: Settings of the training.
        rows: What is learned and avoided.
        folder: Gets the result.
        before: The adapter of the round before; None begins as `spec.start` says.
        number: Of the round; each draws its rows in an order of its own.

    Raises:
        UserError: As `fit`.
    """
    inputs, models = context.inputs, context.models
    asked = requests_for(inputs.benign[: spec.monitor.probes]) if spec.monitor else []

    def probe(loaded: PreTrainedModel) -> list[tuple[str, str]]:
        batches = models.engine_of(loaded).generate(asked, Sampling(max_new_tokens=32), "probe")
        return [(reply.prompt, reply.completion) for batch in batches for reply in batch]

    recipe = context.spec.model_copy(update={"seed": (context.spec.seed + number - 1) % 2**32})
    with models.to_train(spec.start, before) as loaded:
        tell = partial(_tell, context, f"{folder.name}, round {number}" if spec.rounds else folder.name)
        fit(recipe, spec, loaded, inputs.tokenizer, rows, folder, monitor_of(spec, probe), tell)


def _tell(context: Context, name: str, encoded: object) -> None:
    context.tell(f"{name}: {encoded}")


def fit(
    recipe: Recipe,
    spec: Train,
    loaded: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Example],
    folder: Path,
    monitor: CollapseMonitor | None,
    tell: Callable[[object], None],
) -> None:
    """Train a model on rows, going on from the last checkpoint, and save it in `folder/adapter` or `folder/model`.

    `tell` is told what the rows are before the first step.

    Raises:
        UserError: The monitor stopped a training that had no good checkpoint yet, or the checkpoint that is there was
            written under another kind of sharding.
    """
    trainer: Trainer
    if spec.method == "kto":
        if ranks.world_size() > 1:
            raise UserError("train.method kto runs in one process: give this stage no --launch")
        encoding = arguments(recipe, spec, folder).encoding()
        trainer, encoded = kto_trainer(
            loaded, tokenizer, rows, encoding, _common(recipe, spec, folder), spec.beta or BETA
        )
    else:
        rows, watched = _held_out(rows, spec.kl_rows, recipe.seed)
        trainer = TASFTTrainer(
            loaded,
            arguments(recipe, spec, folder),
            rows,
            watched or None,
            processing_class=tokenizer,
            callbacks=[monitor] if monitor else None,
        )
        encoded = trainer.encoding
    tell(encoded)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar(folder.name))
    trainer.add_callback(stop := _Stop())
    trainer.add_callback(_InOrder())
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    finally:
        stop.restore()
    if stop.asked:
        signal.raise_signal(stop.asked)
    if monitor and monitor.stopped and monitor.last_good is None:
        raise UserError(
            f"{folder}: training collapsed before its first checkpoint (monitor.jsonl says how): lower "
            "train.penalty_weight or train.learning_rate, or train.save_steps to keep an earlier state"
        )
    steps = monitor.last_good if monitor and monitor.stopped else trainer.state.global_step
    loaded.eval()
    # Each process may hold a part of the weights: all of them take part in putting the whole together.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if ranks.world_size() > 1 else None
    if ranks.is_first():
        loaded.save_pretrained(folder / ("adapter" if recipe.model.lora else "model"), state_dict=state)
        if recipe.model.lora is None:
            tokenizer.save_pretrained(folder / "model")
        provenance.write_json(folder / "summary.json", {"steps": steps, "precision": spec.precision})


def monitor_of(spec: Train, probe: Callable[[PreTrainedModel], list[tuple[str, str]]]) -> CollapseMonitor | None:
    """The monitor that a recipe asks for, if any; `probe` gives replies to `monitor.probes` benign prompts."""
    wanted = spec.monitor
    if wanted is None or spec.method == "kto":
        return None
    return CollapseMonitor(wanted, probe=probe if wanted.probes else None, every=spec.save_steps)


def _held_out(rows: list[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Rows to train on, and imitate rows to watch: `count`, but at most one in ten."""
    imitate = [index for index, row in enumerate(rows) if row.label]
    chosen = set(random.Random(seed).sample(imitate, min(count, len(imitate) // 10)))
    kept = [row for index, row in enumerate(rows) if index not in chosen]
    return kept, [rows[index] for index in sorted(chosen)]
