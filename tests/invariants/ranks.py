"""One rank of trainings that are compared with others: `launch` starts it, and the test runs it in one process."""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset, SequentialSampler

sys.path[:0] = [str(Path(__file__).parents[1])]

from conftest import tiny_model, tiny_tokenizer  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from tasft import TASFTConfig, TASFTTrainer  # noqa: E402
from tasft.core.ranks import is_first, joined, world_size  # noqa: E402
from tasft.data.rows import Example  # noqa: E402

# The rows of optimizer steps, which two ranks take by twos, in turn: I is to imitate, A to avoid.
STEPS = (
    "IA IA AI II",
    "IA II AI II",  # the second rank has none to avoid
    "II II AA II",  # the first micro-batch has none to avoid on either; the first rank's second has none to imitate
    "AA II AA IA",  # the first rank has none to imitate
    "II II II II",
    "AA AA AA AA",
)
AS_THEY_STAND = "".join(STEPS).replace(" ", "")
# Two epochs of three steps of 7 + 1 rows and a last one of 1 + 1, which the first rank takes alone.
DRAWN = "I" * 22 + "A" * 5
HELD_OUT = "IIAIIAI"
# Name: how the rows come, the model, settings.
CASES = {
    f"{model} {settings['penalty']} {settings.get('normalization', 'per_group')}": (AS_THEY_STAND, model, settings)
    for model, settings in [
        # Each model with a penalty that reads the embedding and with one that does not, and divided in both ways.
        ("lora", {"penalty": "emd_hinge"}),
        ("lora", {"penalty": "nlcl", "normalization": "shared"}),
        ("tied", {"penalty": "emd", "normalization": "shared"}),
        ("tied", {"penalty": "nlcl"}),
        ("untied", {"penalty": "emd_hinge"}),
        ("untied", {"penalty": "nlcl", "normalization": "shared"}),
    ]
} | {
    "stratified, of lora": (DRAWN, "lora", {"penalty": "emd_hinge"}),
    "stratified, of untied": (DRAWN, "untied", {"penalty": "npo", "activation_checkpointing": True}),
    "uniform, input space": (
        DRAWN,
        "lora untied",
        {"penalty": "emd", "sampling": "uniform", "cost_space": "input", "center": True},
    ),
    "end to end": (DRAWN, "tied", {"penalty": "nlcl", "padding_free": True}),
    "a stream": (DRAWN, "untied", {"penalty": "nlcl", "stream": True, "max_steps": 2}),
}


class Stream(IterableDataset):
    """Rows without a number."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def example(index, kind):
    words = f"w{index} " * (1 + index * 5 % 7)
    return Example(f"Say {index}?", words, True) if kind == "I" else Example(f"Do {index}?", f"sure, {words}", False)


class Watched(TASFTTrainer):
    """Keeps which rows each optimizer step holds, and what the optimizer is given."""

    def __init__(self, *args, in_order=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.in_order, self.rows_of_step, self.gradients = in_order, {}, []
        self.add_callback(_Gradients(self.gradients))

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset) if self.in_order else super()._get_train_sampler(train_dataset)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            ids, segments = inputs["input_ids"].flatten(), inputs["segments"].flatten()
            found = [tuple(ids[segments == index].tolist()) for index in range(int(segments.max()) + 1)]
            # Rows of one token are those that fill up an epoch.
            self.rows_of_step.setdefault(self.state.global_step, []).extend(row for row in found if len(row) > 1)
        return super().compute_loss(model, inputs, *args, **kwargs)


class _Gradients(TrainerCallback):
    def __init__(self, kept):
        self.kept = kept

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        # DeepSpeed has taken its step and dropped them by now.
        if not args.deepspeed_plugin:
            self.kept.append(whole({n: p.grad for n, p in model.named_parameters() if p.requires_grad}))


class Death(TrainerCallback):
    """Kills the process at a step, as if the machine had failed."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def whole(tensors):
    """Of sharded tensors the whole, under names that do not tell how the model is wrapped."""
    full = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    return {name.removeprefix("module."): tensor.detach().cpu().clone() for name, tensor in full.items()}


def build(folder, kinds, model, dtype=torch.float64, dropout=0.0, stream=False, **settings):
    lora = LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"]) if "lora" in model else None
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4 // world_size(),
        "per_device_eval_batch_size": 4 // world_size(),
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2 if kinds == DRAWN else 1,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "kl_rows": 0,
        "seed": 3,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "use_cpu": world_size() == 1,
    }
    rows = [example(index, kind) for index, kind in enumerate(kinds)]
    return Watched(
        tiny_model(tied="untied" not in model).to(dtype),
        TASFTConfig(**arguments | settings),
        Stream(rows) if stream else rows,
        [example(100 + index, kind) for index, kind in enumerate(HELD_OUT)] if kinds == DRAWN else None,
        processing_class=tiny_tokenizer(),
        peft_config=lora,
        in_order=kinds == AS_THEY_STAND,
    )


def train(folder, kinds, model, settings, **rest):
    """What one run saw and made, with the rows of all ranks together."""
    if kinds == DRAWN:
        settings = settings | {"eval_strategy": "steps", "eval_steps": 4, "kl_rows": 3}
    subject = build(folder, kinds, model, **settings, **rest)
    subject.train()
    parameters = dict(subject.model.named_parameters())
    sharded = any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in parameters.values())
    shares = [subject.rows_of_step]
    if world_size() > 1:
        shares = [None] * world_size()
        dist.all_gather_object(shares, subject.rows_of_step)
    if subject.is_deepspeed_enabled:
        from deepspeed import zero

        gather = zero.GatheredParameters(
            [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
        )
    with gather if subject.is_deepspeed_enabled else nullcontext():
        weights = whole(parameters)
    return {
        "gradients": subject.gradients,
        "weights": weights,
        "rows": [sorted(row for share in shares for row in share[step]) for step in subject.rows_of_step],
        "log": subject.state.log_history,
        "sharded": sharded,
    }


def train_with_checkpoints(folder, checkpoint=None, death=None):
    """Float32 and with dropout, as users train; in the middle of the second epoch when it dies in step 6."""
    subject = build(
        folder,
        DRAWN,
        "lora",
        torch.float32,
        dropout=0.1,
        penalty="emd_hinge",
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        kl_rows=3,
    )
    if death is not None:
        subject.add_callback(Death(death))
    subject.train(resume_from_checkpoint=checkpoint and str(checkpoint))


def main(task, folder):
    with joined():
        if task == "cases":
            results = {name: train(folder / name, *case) for name, case in CASES.items()}
            if is_first():
                torch.save(results, folder / "results.pt")
        if task == "cases in float32":
            results = {name: train(folder / name, *case, dtype=torch.float32) for name, case in CASES.items()}
            if is_first():
                torch.save(results, folder / "results.pt")
        if task == "cases" and world_size() > 1:
            train_with_checkpoints(folder / "whole")
            train_with_checkpoints(folder / "cut", death=6)
        if task == "go on":
            train_with_checkpoints(folder / "cut", checkpoint=folder / "cut" / "checkpoint-6")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
