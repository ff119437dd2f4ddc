"""Callbacks of a training: its bar, its stop at a signal, and the order of both."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tasft.core import ranks
from tasft.train.checkpoints import STOPPED, _step, _whole


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
        if ranks.world_size() == 1 and threading.current_thread() is threading.main_thread():
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
