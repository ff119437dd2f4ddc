"""What an optimizer step of TA-SFT costs, beside plain fine-tuning and KTO with TRL, and plain fine-tuning otherwise.

All contestants train the same LoRA on the same model and the same token ids, the same rows in every step. Each lives in
a process of its own, and they take turns: one step of the first, one of the second and so on, then the next round.
The speed of a machine drifts; the ratio of two steps of the same round hardly. A step is timed from the end of the one
before, so that fetching rows, the optimizer and the trainer's own bookkeeping count. The first round does not, nor what
passes between two turns: a process that waits gives back free memory, and has to ask for it again (see README.md).

Peak memory is that of the process, or of torch's allocator on a GPU, above the model as it is once it is loaded.

The floor is what the matrix products that the work needs would take at the rate of a large square product measured in
the same round: with frozen weights 4 operations for each weight and token, 2 forward and 2 backward (with trained ones
it would be 6); of the output head for each label only. Nothing else is counted.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import code, environment, machine, markdown, put
from loss import cpu_rate, forget_peak, gpu_rate, number, resident_peak
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from tasft.core.errors import UserError
from tasft.data.encode import Encoding, encode_rows
from tasft.data.rows import Example, read_prompts
from tasft.loss import IGNORE_INDEX, PENALTIES
from tasft.models.load import load_model, load_tokenizer
from tasft.train.trainer import TASFTConfig, TASFTTrainer

# Random weights of a real shape where the model itself is not needed: they cost what real ones do.
SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma-3-270m": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=262144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            sliding_window=512,
        )
    ),
    "llama-3.2-1b": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        )
    ),
    "tiny": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    ),
}
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)

SHARE = 20  # One row in so many is one to avoid.
WORDS = (10, 110)  # In the shortest and the longest completion.
SFT, OURS = "trl_sft", "tasft_none"  # What the others are compared with.


class Plan(NamedTuple):
    """What is trained, and how; every process gets it."""

    folder: str
    scratch: str
    device: str
    dtype: str
    quantize: str
    threads: int
    rows: int
    micro_batch: int
    steps: int

    def arguments(self) -> dict[str, Any]:
        """What every trainer is told."""
        return {
            "output_dir": self.scratch,
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.rows // self.micro_batch,
            "max_steps": self.steps,
            "learning_rate": 1e-5,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "logging_steps": 1000,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": self.device == "cpu",
            "dataloader_pin_memory": self.device == "cuda",
            "bf16": self.dtype == "bfloat16",
        }


@dataclass(frozen=True)
class Entry:
    """What a contestant gets."""

    plan: Plan
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]

    def adapter(self) -> LoraConfig:
        """What is trained."""
        return LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )

    def encoded(self) -> list[dict[str, Any]]:
        """The rows of one step: token ids and labels."""
        # KTO's trainer puts an end token behind every row, so all have it.
        rows, _ = encode_rows(self.examples, self.tokenizer, Encoding(penalize_eos=True))
        return rows

    def repeated(self, rows: list[Any]) -> list[Any]:
        """A step's rows for each of the steps."""
        return rows * self.plan.steps


# --- Who takes part -------------------------------------------------------------------------


def tasft(penalty: str, entry: Entry, **options: Any) -> Trainer:
    examples = entry.examples
    if penalty == "none":
        examples = [Example(row.prompt, row.completion, label=True) for row in examples]
    arguments = entry.plan.arguments()
    del arguments["train_sampling_strategy"]
    trainer = TASFTTrainer(
        entry.model,
        TASFTConfig(**arguments, penalty=penalty, penalize_eos=True, **options),
        train_dataset=entry.repeated(examples),
        processing_class=entry.tokenizer,
        peft_config=entry.adapter(),
    )
    # In the given order, as the others: every step has the same rows.
    trainer._get_train_sampler = SequentialSampler
    return trainer


def plain(entry: Entry) -> Trainer:
    """As the Trainer comes: the model makes all logits."""
    return Trainer(
        model=get_peft_model(entry.model, entry.adapter()),
        args=TrainingArguments(**entry.plan.arguments()),
        train_dataset=entry.repeated(columns(entry.encoded())),
        data_collator=DataCollatorForSeq2Seq(entry.tokenizer),
    )


def trl_sft(entry: Entry, **options: Any) -> Trainer:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=entry.model,
        args=SFTConfig(**entry.plan.arguments(), **options),
        train_dataset=Dataset.from_list(entry.repeated(columns(entry.encoded()))),
        processing_class=entry.tokenizer,
        peft_config=entry.adapter(),
    )


def trl_kto(entry: Entry, **options: Any) -> Trainer:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    encoded = entry.encoded()
    texts = [
        {
            "prompt": entry.tokenizer.decode(row["input_ids"][: row["labels"].count(IGNORE_INDEX)]),
            "completion": example.completion,
            "label": example.label,
        }
        for row, example in zip(encoded, entry.examples, strict=True)
    ]
    trainer = KTOTrainer(
        model=entry.model,
        args=KTOConfig(**entry.plan.arguments(), **options),
        train_dataset=Dataset.from_list(entry.repeated(texts)),
        processing_class=entry.tokenizer,
        peft_config=entry.adapter(),
    )
    found = [row["prompt_ids"] + row["completion_ids"] for row in trainer.train_dataset]
    if found != entry.repeated([row["input_ids"] for row in encoded]):
        raise ValueError("TRL reads other tokens")
    return trainer


def columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("input_ids", "labels")} for row in rows]


class Contestant(NamedTuple):
    """Someone who takes part: makes a trainer, and needs a package that may be missing."""

    build: Callable[[Entry], Trainer]
    package: str | None = None


CONTESTANTS = {
    "transformers": Contestant(plain),
    "trl_sft_default": Contestant(trl_sft, "trl"),
    SFT: Contestant(partial(trl_sft, gradient_checkpointing=False), "trl"),
    OURS: Contestant(partial(tasft, "none")),
    "tasft_padding_free": Contestant(partial(tasft, "none", padding_free=True)),
    **{f"tasft_{name}": Contestant(partial(tasft, name)) for name in PENALTIES},
    "trl_kto": Contestant(partial(trl_kto, gradient_checkpointing=False, precompute_ref_log_probs=True), "trl"),
}


def missing() -> dict[str, str]:
    """The contestants that cannot take part, and why. Packages of the others have been imported, before any fork."""
    reasons = {}
    for name, contestant in CONTESTANTS.items():
        try:
            if contestant.package:
                import_module(contestant.package)
        except ImportError as error:
            reasons[name] = f"no package {error.name}"
    return reasons


# --- What they train ------------------------------------------------------------------------


def texts() -> list[str]:
    return [prompt.prompt for prompt in read_prompts("demo-benign-train")]


def made_tokenizer() -> PreTrainedTokenizerBase:
    """Whole words as tokens, for a model that has no tokenizer."""
    words = SPECIAL + sorted(set(" ".join(texts()).split()))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=SPECIAL[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:3]})
    made.chat_template = CHAT
    return made


def examples(count: int) -> list[Example]:
    """Harmless English, from the shortest to the longest: completions of as many words as a geometric series has."""
    prompts = texts()
    words = cycle(" ".join(prompts).split())
    low, high = WORDS
    rows = []
    for index, prompt in zip(range(count), cycle(prompts), strict=False):
        length = round(low * (high / low) ** (index / (count - 1)))
        completion = " ".join(islice(words, length))
        rows.append(Example(prompt, completion, label=index % SHARE != SHARE // 2))
    return rows


def save(model: str, folder: str, device: str, dtype: str) -> dict[str, Any]:
    """Lay a model down where every process finds it fast; its size."""
    if model in SHAPES:
        torch.manual_seed(0)
        with torch.device(device):
            made: PreTrainedModel = SHAPES[model]().to(getattr(torch, dtype))
        tokenizer = made_tokenizer()
    else:
        made, tokenizer = load_model(model), load_tokenizer(model)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    head = made.get_output_embeddings().weight
    embeddings = {head, made.get_input_embeddings().weight}
    body = sum(weight.numel() for weight in made.parameters() if not any(weight is other for other in embeddings))
    return {"model": model, "body": body, "head": head.numel(), "vocabulary": len(head)}


# --- How it is measured ---------------------------------------------------------------------


class Turns(TrainerCallback):
    """Takes a step when it is told to, and tells the seconds it took."""

    def __init__(self, pipe: Connection, device: str) -> None:
        self.pipe, self.device = pipe, device
        self.start = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Stand ready."""
        self._wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Tell the time; what the trainer still does after it belongs to the next turn."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        give_back()  # Not after the answer: by then the next one is measured.
        self.pipe.send(seconds)
        self._wait()

    def _wait(self) -> None:
        self.pipe.recv()
        self.start = time.perf_counter()


def compete(name: str, plan: Plan, pipe: Connection) -> None:
    """A process: sends the seconds until it is ready, those of each step, bytes at the peak; or why it cannot."""
    torch.set_num_threads(plan.threads)
    transformers_logging.set_verbosity_error()
    try:
        entry = Entry(
            plan,
            load_model(plan.folder, plan.dtype, quantize=plan.quantize),
            load_tokenizer(plan.folder),
            examples(plan.rows),
        )
        touch(entry.model)
        before = restart_peak(plan.device)
        start = time.perf_counter()
        trainer = CONTESTANTS[name].build(entry)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Turns(pipe, plan.device))
        pipe.send(time.perf_counter() - start)
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if plan.device == "cuda" else resident_peak()
        pipe.send(peak - before)
    except torch.OutOfMemoryError:
        pipe.send("out of memory")
    except UserError as error:
        pipe.send(str(error))
    except EOFError:  # The process that tells the turns is gone.
        return


def give_back() -> None:
    """Return free memory to the system, where it can: a dozen processes would not fit with what each keeps."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def touch(model: PreTrainedModel) -> None:
    """Read every weight, and start the threads: a file is mapped, and its pages count once they are read."""
    model(torch.zeros(1, 8, dtype=torch.long, device=model.device))


def restart_peak(device: str) -> int:
    """Bytes held now, from where the peak starts again."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    forget_peak()
    return resident_peak()


class Runner:
    """The other end of `compete`."""

    def __init__(self, name: str, plan: Plan) -> None:
        self.pipe, theirs = Pipe()
        # A fork has imported everything already. A GPU does not survive it.
        context = get_context("fork" if plan.device == "cpu" else "spawn")
        self.process = context.Process(target=compete, args=(name, plan, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.reason: str | None = None
        self.setup = self._answer()
        self.seconds: list[float] = []
        self.peak = 0.0

    def step(self) -> None:
        """One turn."""
        self.seconds.append(self._next())

    def finish(self) -> None:
        """Hear the peak."""
        self.peak = self._next()
        self.process.join()

    def _next(self) -> float:
        if self.reason is None:
            self.pipe.send("go")
        return self._answer()

    def _answer(self) -> float:
        if self.reason is not None:
            return 0.0
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            answer = f"ended with exit code {self.process.exitcode}"
        if isinstance(answer, str):
            self.reason = answer
            return 0.0
        return float(answer)


def measure(names: list[str], plan: Plan, reasons: dict[str, str]) -> tuple[dict[str, Runner], list[float]]:
    """Everyone's steps, round by round, and the rate in operations a second of each round."""
    runners = {}
    for name in names:
        if name not in reasons:
            print(f"{name} ...", file=sys.stderr, flush=True)
            runners[name] = Runner(name, plan)
    rate = partial(cpu_rate, getattr(torch, plan.dtype), plan.threads)
    if plan.device == "cuda":
        rate = partial(gpu_rate, getattr(torch, plan.dtype))
    rates = []
    for index in range(plan.steps):
        print(f"round {index} of {plan.steps - 1} ...", file=sys.stderr, flush=True)
        rates.append(rate())
        for runner in runners.values():
            runner.step()
    for runner in runners.values():
        runner.finish()
    return runners, rates


def report_rows(
    names: list[str], runners: dict[str, Runner], rates: list[float], reasons: dict[str, str], work: dict[str, Any]
) -> list[dict[str, Any]]:
    reasons = reasons | {name: runner.reason for name, runner in runners.items() if runner.reason}
    floors = [work["operations"] / rate for rate in rates[1:]]
    times = {name: runner.seconds[1:] for name, runner in runners.items() if name not in reasons}
    rows = []
    for name in names:
        if name in reasons:
            rows.append({"contestant": name, "not_run": reasons[name]})
            continue
        own = times[name]
        row: dict[str, Any] = {"contestant": name, "times_s": own, "time_s": statistics.median(own)}
        for other in (SFT, OURS):
            ratios = [one / two for one, two in zip(own, times.get(other, []), strict=False)]
            row[f"time_to_{other}"] = statistics.median(ratios) if ratios else None
            row[f"time_to_{other}_range"] = [min(ratios), max(ratios)] if ratios else None
            base = runners[other].peak if other in times else 0.0
            row[f"peak_to_{other}"] = runners[name].peak / base if base else None
        rows.append(
            row
            | {
                "peak_mib": runners[name].peak / 2**20,
                "tokens_per_s": work["tokens"] / row["time_s"],
                "floor_s": statistics.median(floors),
                "floor_ratio": statistics.median(one / floor for one, floor in zip(own, floors, strict=True)),
                "setup_s": runners[name].setup,
            }
        )
    return rows


# --- How it is told -------------------------------------------------------------------------

COLUMNS = (
    "contestant",
    "step, s",
    "/ `trl_sft`",
    "/ `tasft_none`",
    "peak, MiB",
    "peak / `trl_sft`",
    "tokens/s",
    "step / floor",
    "set-up, s",
)


def table(report: dict[str, Any]) -> str:
    """The report as a table in Markdown, with what it was measured on under it."""
    lines = [COLUMNS, ("---",) + ("--:",) * (len(COLUMNS) - 1)]
    lines += [(f"`{row['contestant']}`", *cells(row)) for row in report["rows"]]
    where, work = report["environment"], report["work"]
    packages = ", ".join(f"{name} {of}" for name, of in report["packages"].items() if of)
    caption = (
        f"{work['model']}; a step of {work['rows']} rows in micro-batches of {work['micro_batch']}, {work['tokens']} "
        f"tokens ({work['labels']} labels; rows of {work['shortest']} to {work['longest']}), "
        f"1 row in {SHARE} to avoid; {len(report['rates_gflops'])} rounds; floor {work['floor_s']:.2f} s at "
        f"{statistics.median(report['rates_gflops']):.0f} GFLOP/s.\n"
        f"{machine(where)}, {packages}; {code(where)}."
    )
    return markdown(lines, caption)


def cells(row: dict[str, Any]) -> list[str]:
    if "not_run" in row:
        return [f"not run: {row['not_run']}"] + [""] * (len(COLUMNS) - 2)
    return [
        number(row["time_s"]),
        ratio(row, SFT),
        ratio(row, OURS),
        number(row["peak_mib"]),
        "-" if row[f"peak_to_{SFT}"] is None else f"{row[f'peak_to_{SFT}']:.2f}",
        number(row["tokens_per_s"]),
        f"{row['floor_ratio']:.2f}",
        number(row["setup_s"]),
    ]


def ratio(row: dict[str, Any], other: str) -> str:
    if row[f"time_to_{other}"] is None:
        return "-"
    low, high = row[f"time_to_{other}_range"]
    return f"{row[f'time_to_{other}']:.2f} ({low:.2f} to {high:.2f})"


def installed(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model with random weights, under a minute")
    parser.add_argument("--model", default="smollm2-135m-instruct", help=f"any, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantize", choices=["none", "4bit"], default="none", help="the frozen weights")
    parser.add_argument("--rows", type=int, help=f"in a step, a multiple of {SHARE}; by default {SHARE}, 160 on a GPU")
    parser.add_argument("--micro-batch", type=int, help="rows in a forward pass; by default a quarter of a step's")
    parser.add_argument("--rounds", type=int, help="that are timed; by default 5, 2 if quick, 20 on a GPU")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only contestants of these names, or parts of them")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--page", type=Path, metavar="PATH", help="put the table between the marks of this page")
    args = parser.parse_args()
    rows = args.rows or (160 if args.device == "cuda" else SHARE)
    micro_batch = args.micro_batch or rows // 4
    if rows % SHARE or rows % micro_batch:
        parser.error(f"a step of {rows} rows: take a multiple of {SHARE} and of the rows in a micro-batch")
    rounds = args.rounds or (20 if args.device == "cuda" else 2 if args.quick else 5)
    model = "tiny" if args.quick else args.model

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Threads do not outlive a fork, and a child would wait for them.
    reasons = missing()
    only = args.only or [""]
    names = [
        name for name in CONTESTANTS if any(text == name or (text not in CONTESTANTS and text in name) for text in only)
    ]
    if not names:
        parser.error(f"no contestant is named like {args.only}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = f"{temporary}/model"
        size = save(model, folder, args.device, args.dtype)
        plan = Plan(
            folder, f"{temporary}/run", args.device, args.dtype, args.quantize, threads, rows, micro_batch, 1 + rounds
        )
        encoded, _ = encode_rows(examples(rows), load_tokenizer(folder), Encoding(penalize_eos=True))
        runners, rates = measure(names, plan, reasons)
    lengths = [len(row["input_ids"]) for row in encoded]
    labels = sum(len(row["labels"]) - row["labels"].count(IGNORE_INDEX) for row in encoded)
    operations = 4 * (size["body"] * sum(lengths) + size["head"] * labels)
    work = size | {
        "quantize": args.quantize,
        "rows": rows,
        "micro_batch": micro_batch,
        "tokens": sum(lengths),
        "labels": labels,
        "shortest": min(lengths),
        "longest": max(lengths),
        "operations": operations,
        "floor_s": statistics.median(operations / rate for rate in rates[1:]),
    }
    report = {
        "environment": environment(args.device, args.dtype, threads),
        "packages": {name: installed(name) for name in ("transformers", "peft", "trl")},
        "work": work,
        "rates_gflops": [rate / 1e9 for rate in rates[1:]],
        "rows": report_rows(names, runners, rates, reasons, work),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    if args.page:
        put(table(report), "step", args.page)


if __name__ == "__main__":
    main()
