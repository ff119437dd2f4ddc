"""A monitor over training: it notices the collapse that penalties allow, and acts."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tasft.core.errors import UserError
from tasft.core.provenance import append_jsonl, resume_jsonl, write_jsonl
from tasft.judges.coherence import incoherence
from tasft.train.settings import MonitorSettings

logger = logging.getLogger(__name__)

Probe = Callable[[Any], Sequence[tuple[str, str]]]

# What is measured, by its name in the log; its unit; what it means to be over the limit.
_MEASURES = {
    "entropy": ("the entropy on avoid tokens", " nats", "there the model says one thing, whatever the question"),
    "imitate_nll": ("the loss on imitate tokens", " nats", "what should be learned is being lost"),
    "kl": ("the KL to the model at step 0 on imitate rows", " nats", "no data asks for a change as large as this"),
    "broken": ("the share of probe replies that broke since the start", "", "no reader could use them"),
}
_ADVICE = "Lower penalty_weight or learning_rate, or add anchors"


@dataclass
class _Seen:
    """What a resumed run must know of its past.

    Attributes:
        first: First value of each measure.
        over: Of each measure, how often in a row it was over its limit, up to now.
        warned: Measures that were warned of.
        sound: Of each probe reply at the start, whether it was coherent.
        last_good: Step of the last checkpoint that was saved while nothing was over a limit.
    """

    first: dict[str, float] = field(default_factory=dict)
    over: dict[str, int] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    sound: list[bool] | None = None
    last_good: int | None = None


class CollapseMonitor(TrainerCallback, ExportableState):
    """Watches entropy, losses and a few replies during training, and acts when the model collapses.

    It reads `entropy` (on avoid tokens), `imitate_nll` and, where it is logged, `kl` from the log of a
    `TASFTTrainer`, and asks the probe for replies. A measure that is over its limit `patience` logs in a row trips the
    monitor. The probe trips it at once: its prompts stay the same and its replies are not drawn.

    What then happens is logged as a warning and kept in `monitor.jsonl` in the output folder, a row for each measure
    that tripped: `step, measure, value, limit, action, message`, and the `checkpoint` that was gone back to. An empty
    file says that nothing happened.

    - `warn`: nothing else; once for each measure.
    - `stop`: training ends, and the trainer is left with the last checkpoint that was saved while nothing was over a
      limit, which `save_total_limit` spares. If there is none, the model is left as it is.

    With several processes all act on what the first one measured.

    Args:
        settings: Where a healthy training ends, and what happens beyond that; its `probes` are counted by whoever makes
            the probe.
        probe: Takes the model, in evaluation mode, and returns prompts and its greedy replies to them, the same
            prompts each time. Runs in every process, before the first step too. None for no probe.
        every: Steps between probes. Best a divisor of `save_steps`: a probe comes before the checkpoint of its step.

    Raises:
        UserError: On training, arguments of the trainer that contradict the monitor's work.
    """

    def __init__(self, settings: MonitorSettings | None = None, *, probe: Probe | None = None, every: int = 50) -> None:
        self.settings = settings or MonitorSettings()
        self.probe = probe
        self.every = every
        self.stopped = False
        self._seen = _Seen()

    @property
    def last_good(self) -> int | None:
        """Step of the last checkpoint that was saved while nothing was over a limit; None when there is none."""
        return self._seen.last_good

    def state(self) -> dict[str, Any]:
        """What transformers keeps of it in a checkpoint's `trainer_state.json`."""
        return {"args": {}, "attributes": {"seen": asdict(self._seen)}}

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Take up what the checkpoint knew, drop events of steps that will be run again, probe the start."""
        if args.restore_callback_states_from_checkpoint:
            # transformers would build the monitor anew, without its probe.
            raise UserError("CollapseMonitor takes up its own state: leave restore_callback_states_from_checkpoint off")
        if self.settings.action == "stop" and args.metric_for_best_model is not None:
            raise UserError(
                "CollapseMonitor with action stop and metric_for_best_model would both say which checkpoint is kept: "
                "leave metric_for_best_model and load_best_model_at_end off, or use another action"
            )
        self.stopped = False
        name = type(self).__name__
        kept = state.stateful_callbacks.get(name) if state.global_step else None
        self._seen = _Seen(**kept["attributes"]["seen"]) if kept else _Seen()
        # transformers fails to save when a checkpoint that was made without the monitor is taken up.
        state.stateful_callbacks[name] = self.state()
        if state.is_world_process_zero:
            path = _events(args)
            write_jsonl(path, [row for row in resume_jsonl(path) if row["step"] <= state.global_step])
        if state.global_step and self.settings.action == "stop":
            good = self._seen.last_good if any(self._seen.over.values()) else state.global_step
            # It may have been taken up from another folder, or be deleted.
            exists = good is not None and _of_first_process(Path(_checkpoint(args, good)).is_dir())
            self._keep(good if exists else None, args, state)
        if self.probe is not None and self._seen.sound is None:
            self._seen.sound = self._ask(self.probe, model)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> TrainerControl:
        """Probe, when it is time."""
        if self.probe is not None and state.global_step % self.every == 0:
            now = self._ask(self.probe, model)
            broke = [was and not still for was, still in zip(self._seen.sound or [], now, strict=True)]
            self._judge({"broken": sum(broke) / len(broke)}, args, state, control)
        return control

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> TrainerControl:
        """Look at what was logged."""
        if logs and "loss" in logs:
            measured = {name: float(logs[name]) for name in _MEASURES if name in logs}
            self._judge(_of_first_process(measured), args, state, control)
        return control

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the last good checkpoint spared."""
        if self.settings.action != "stop":
            return
        if not any(self._seen.over.values()):
            self._keep(state.global_step, args, state)
        elif state.global_step >= state.max_steps:
            # With save_total_limit 1, transformers would delete the end of a training that was not stopped.
            state.best_model_checkpoint = None

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Save nothing after a stop."""
        control.should_save &= not self.stopped
        return control

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the arguments as they were given."""
        if self.stopped:
            args.load_best_model_at_end = False

    def _ask(self, probe: Probe, model: Any) -> list[bool]:
        """Of each probe reply, whether it is coherent."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                replies = probe(model)
        finally:
            model.train(training)
        return _of_first_process([incoherence(prompt, reply) is None for prompt, reply in replies])

    def _keep(self, step: int | None, args: Any, state: TrainerState) -> None:
        self._seen.last_good = step
        # The one that transformers spares when it deletes old checkpoints, and can go back to.
        state.best_model_checkpoint = None if step is None else _checkpoint(args, step)

    def _judge(self, measured: dict[str, float], args: Any, state: TrainerState, control: TrainerControl) -> None:
        tripped = []
        for measure, value in measured.items():
            limit = self.settings.limit(measure, self._seen.first.setdefault(measure, value))
            if limit is None:
                continue
            # Written so that nan is over.
            good = value >= limit if measure == "entropy" else value <= limit
            count = self._seen.over[measure] = 0 if good else self._seen.over.get(measure, 0) + 1
            patience = 1 if measure == "broken" else self.settings.patience
            if count and count % patience == 0:
                tripped.append((measure, value, limit, patience))
        if not tripped or self.stopped:
            return
        action, sentence, more = self._act(args, state, control)
        if action == "warn":
            tripped = [trip for trip in tripped if trip[0] not in self._seen.warned]
            self._seen.warned += [measure for measure, *_ in tripped]
        for measure, value, limit, patience in tripped if state.is_world_process_zero else []:
            what, unit, meaning = _MEASURES[measure]
            message = (
                f"step {state.global_step}: {what} is {value:.3g}{unit}, "
                f"{'below' if measure == 'entropy' else 'above'} its limit of {limit:.3g}"
                f"{f' for {patience} logs in a row' if patience > 1 else ''}: {meaning}. {sentence}."
            )
            logger.warning(message)
            row = {"step": state.global_step, "measure": measure, "value": _number(value), "limit": _number(limit)}
            append_jsonl(_events(args), [row | {"action": action, "message": message} | more])

    def _act(self, args: Any, state: TrainerState, control: TrainerControl) -> tuple[str, str, dict[str, Any]]:
        """What is done, a sentence about it, and what the event tells besides."""
        if self.settings.action == "stop":
            self.stopped = True
            control.should_training_stop = True
            # The newest checkpoint is what a resume begins with.
            control.should_save = False
            if self.last_good is None:
                return "stop", f"Training stops; no checkpoint was saved before, so the model is left so. {_ADVICE}", {}
            args.load_best_model_at_end = True
            good = Path(_checkpoint(args, self.last_good)).name
            return "stop", f"Training stops and goes back to {good}. {_ADVICE}", {"checkpoint": good}
        return "warn", _ADVICE, {}


def _number(value: float) -> float | None:
    # JSON has no nan.
    return value if math.isfinite(value) else None


def _events(args: Any) -> Path:
    return Path(args.output_dir) / "monitor.jsonl"


def _checkpoint(args: Any, step: int) -> str:
    # Written as transformers writes it when it looks for the one to spare.
    return str(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}")


def _of_first_process(value: Any) -> Any:
    """The value that the first process has: what all decide from must be the same."""
    if distributed.is_available() and distributed.is_initialized():
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]
    return value
