"""One training of a run: from settings in a recipe to weights in a folder."""

import json
import os
import random
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tasft import launch, model, provenance
from tasft.baselines import kto_trainer
from tasft.data import Example
from tasft.errors import UserError
from tasft.guard import CollapseGuard, GuardLimits
from tasft.recipe import Recipe, Train
from tasft.trainer import TASFTConfig, TASFTTrainer


def _common(recipe: Recipe, spec: Train, folder: Path) -> dict[str, Any]:
    """What any trainer is told.

    Raises:
        UserError: The rows of a step cannot be shared evenly between the processes.
    """
    processes = launch.world_size()
    micro = spec.micro_batch_size or max(1, spec.batch_size // processes)
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
        "max_steps": spec.steps or -1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": spec.batch_size // (micro * processes),
        # All of them are used: a term without rows is a zero that reaches every parameter.
        "ddp_find_unused_parameters": False,
        "learning_rate": spec.learning_rate,
        "warmup_steps": spec.warmup,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "logging_steps": 5,
        "logging_first_step": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_steps": spec.save_steps,
        "save_total_limit": None if recipe.evaluate.checkpoints and folder.name == "train" else 1,
        "seed": recipe.seed,
        "report_to": "none",
    }


def arguments(recipe: Recipe, spec: Train, folder: Path) -> TASFTConfig:
    """What our trainer is told.

    Raises:
        UserError: The rows of a step cannot be shared evenly between the processes.
    """
    return TASFTConfig(
        **_common(recipe, spec, folder),
        penalty=spec.penalty if spec.method == "tasft" else "none",
        penalty_weight=spec.penalty_weight,
        normalization=spec.normalization,
        sampling=spec.sampling,
        avoid_per_step=spec.avoid_per_step,
        cost_space=spec.cost_space,
        center=spec.center,
        beta=spec.beta,
        padding_free=spec.padding_free,
        kl_rows=spec.kl_rows,
        prompt_format=recipe.model.prompt,
        max_length=spec.max_length,
        turns=spec.turns,
        penalize_end=spec.penalize_end,
        overlong=spec.overlong,
        duplicates=spec.duplicates,
        chat_template_kwargs=recipe.model.chat_template_kwargs,
    )


def fit(
    recipe: Recipe,
    spec: Train,
    loaded: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Example],
    folder: Path,
    guard: CollapseGuard | None = None,
) -> None:
    """Train a model on rows, going on from the last checkpoint, and save it in `folder/adapter` or `folder/model`.

    Raises:
        UserError: The guard stopped a training that had no good checkpoint yet, or the checkpoint that is there was
            written under another kind of sharding.
    """
    trainer: Trainer
    if spec.method == "kto":
        if launch.world_size() > 1:
            raise UserError("train.method kto runs in one process: give this stage no --launch")
        encoding = arguments(recipe, spec, folder).encoding()
        trainer, encoded = kto_trainer(loaded, tokenizer, rows, encoding, _common(recipe, spec, folder), spec.beta)
    else:
        rows, watched = _held_out(rows, spec.kl_rows, recipe.seed)
        trainer = TASFTTrainer(
            loaded,
            arguments(recipe, spec, folder),
            rows,
            watched or None,
            processing_class=tokenizer,
            callbacks=[guard] if guard else None,
        )
        encoded = trainer.encoding
    if launch.is_first():
        print(f"{folder.name}: {encoded}", flush=True)
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
    if guard and guard.stopped and guard.last_good is None:
        raise UserError(
            f"{folder}: training collapsed before its first checkpoint (guard.jsonl says how): lower "
            "train.penalty_weight or train.learning_rate, or train.save_steps to keep an earlier state"
        )
    steps = guard.last_good if guard and guard.stopped else trainer.state.global_step
    loaded.eval()
    # Each process may hold a part of the weights: all of them take part in putting the whole together.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if launch.world_size() > 1 else None
    if launch.is_first():
        loaded.save_pretrained(folder / ("adapter" if recipe.model.lora else "model"), state_dict=state)
        if recipe.model.lora is None:
            tokenizer.save_pretrained(folder / "model")
        provenance.write_json(folder / "summary.json", {"steps": steps})


class _Bar(TrainerCallback):
    """Steps done, their rate, the time left and the loss; what else is logged stands in metrics.jsonl."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            unit="step",
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3g}", refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()


# In a checkpoint that was written because training was stopped there, at no multiple of save_steps.
STOPPED = "stopped"


class _Stop(TrainerCallback):
    """On SIGTERM and Ctrl-C the step is ended and a checkpoint written; the second signal is taken at once.

    Of several processes none waits: they do not hear of it in the same step.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if launch.world_size() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: object) -> None:
        if self.asked is not None and number == signal.SIGINT:
            self.restore()
            signal.raise_signal(number)
        self.asked = number
        # print could be at work already.
        os.write(2, b"\ntasft: a checkpoint is written when this step is done; Ctrl-C again stops at once\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked is not None:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked is not None and state.global_step % args.save_steps:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / STOPPED).touch()

    def restore(self) -> None:
        """Let signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def checkpoints(folder: Path, save_steps: int) -> list[str]:
    """Names of the checkpoints of a finished training, in its order, without one that equals its result.

    Raises:
        UserError: Earlier ones were not kept, or they hold parts of a model.
    """
    found = sorted((path for path in _whole(folder) if not (path / STOPPED).exists()), key=_step)
    if len(found) == 1 and _step(found[0]) > save_steps:
        raise UserError(
            f"evaluate.checkpoints: {folder} was trained without it and kept its last checkpoint alone: remove that "
            "folder to have it trained again"
        )
    result = {provenance.file_hash(path) for path in _weights(folder / "adapter") + _weights(folder / "model")}
    kept = []
    for path in found:
        weights = _weights(path)
        if not weights:
            raise UserError(f"evaluate.checkpoints: {path} holds parts of a model: train with --launch ddp or none")
        if {provenance.file_hash(each) for each in weights} != result:
            kept.append(path.name)
    return kept


def _weights(folder: Path) -> list[Path]:
    return sorted([*folder.glob("adapter_model*.safetensors"), *folder.glob("model*.safetensors")])


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _whole(folder: Path) -> list[Path]:
    # trainer_state.json is written last: a folder without it is half a checkpoint.
    return [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]


def guard_of(spec: Train, probe: Callable[[PreTrainedModel], list[tuple[str, str]]]) -> CollapseGuard | None:
    """The guard that a recipe asks for, if any; `probe` gives a model's replies to `guard.probes` ordinary prompts."""
    wanted = spec.guard
    if wanted is None or spec.method == "kto":
        return None
    return CollapseGuard(
        GuardLimits(**{each.name: getattr(wanted, each.name) for each in fields(GuardLimits)}),
        wanted.action,
        probe=probe if wanted.probes else None,
        every=spec.save_steps,
        patience=wanted.patience,
        factor=wanted.factor,
        times=wanted.times,
    )


def _held_out(rows: list[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Rows to train on, and imitate rows to watch: `count`, but at most one in ten."""
    imitate = [index for index, row in enumerate(rows) if row.label]
    chosen = set(random.Random(seed).sample(imitate, min(count, len(imitate) // 10)))
    kept = [row for index, row in enumerate(rows) if index not in chosen]
    return kept, [rows[index] for index in sorted(chosen)]


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that can be gone on from; those that are damaged are removed, and it is said.

    Raises:
        UserError: It was written under another kind of sharding.
    """
    newest: Path | None = None
    for path in sorted(_whole(folder), key=_step, reverse=True):
        damage = _damage(path)
        if damage is None:
            newest = path
            break
        launch.wait()  # All have looked at it.
        if launch.is_first():
            print(f"note: {damage}: training goes on from before {path.name}", flush=True)
            shutil.rmtree(path)
    if newest is None:
        return None
    kinds = {"fsdp": "pytorch_model_fsdp*", "deepspeed": "global_step*"}
    wrote = next((kind for kind, files in kinds.items() if any(newest.glob(files))), None)
    if wrote != launch.sharding():
        raise UserError(
            f"{newest} was written {f'under {wrote}' if wrote else 'by whole models'}: give the --launch that it was "
            "begun with, or remove it to begin anew"
        )
    return str(newest)


def _damage(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is damaged, after a power cut or by a bad disk; None if none is."""
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                model.check_tensors(path)
            elif path.suffix in (".pt", ".pth", ".bin") and path.is_file():
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        raise zipfile.BadZipFile
        except (ValueError, zipfile.BadZipFile, UserError):
            return f"{path}: damaged or cut short"
    return None


class _InOrder(TrainerCallback):
    """Dates each checkpoint by its step: of several the Trainer removes the oldest, and clocks may jump back."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Date those that are there."""
        if state.is_world_process_zero:
            for path in _whole(Path(args.output_dir or "")):
                os.utime(path, (_step(path), _step(path)))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Date the one that was saved."""
        self.on_train_begin(args, state, control)
