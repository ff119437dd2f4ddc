"""What training leaves to be read: a row for each logging step."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasft.core.provenance import resume_jsonl, write_jsonl


class MetricsFile(TrainerCallback):
    """Keeps `metrics.jsonl`: one row for each logging step, none twice after a resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop rows of steps that will be run again."""
        if state.is_world_process_zero:
            rows = resume_jsonl(self.path)
            write_jsonl(self.path, [row for row in rows if row["step"] <= state.global_step])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append a row."""
        if state.is_world_process_zero and logs and "loss" in logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def peak_mib() -> float:
    """Most memory held so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)
