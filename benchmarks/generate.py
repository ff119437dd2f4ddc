"""Replies per second of `TransformersEngine`, beside plain loops over `model.generate`.

All answer the same chat prompts, taking the likeliest token every time, with the same limit and end tokens, from text
to text. Prompts and replies are of mixed lengths: some prompts come after others that are not to be answered, and most
ask for a word, a sentence or two. The contestants take turns, all once a round, and every rate is divided by that of
`plain` in the same round: the speed of a machine drifts, the ratio hardly.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import code, environment, machine, markdown, put
from loss import number
from rich.console import Console
from rich.markdown import Markdown
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from tasft.data.rows import Prompt, read_prompts
from tasft.models.bundled import BUNDLED
from tasft.models.engine import Sampling, requests_for
from tasft.models.load import load_model, load_tokenizer
from tasft.models.local import TransformersEngine

MODEL = "smollm2-135m-instruct"
SOURCES = ("demo-benign-train", "demo-benign-heldout", "demo-benign-validation", "demo-toxic-harvest")
ENDINGS = ("", " Answer in one word.", " Answer in one sentence.", " Answer in two sentences.")
BEFORE = (0, 2, 6)  # Questions before the one that is to be answered.
CONTEXT = 512  # Tokens that llama.cpp makes room for in each slot: the longest prompt and reply.
BATCH = 64  # The engine's default.
ALONE = 8  # One prompt in so many is answered with batches of 1: all of them would take too long.
PLAIN = "plain"  # What the others are compared with.


class Work(NamedTuple):
    """What is to be done."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    limit: int
    batch: int
    llama: Callable[[int], Any] | None = None
    exact: PreTrainedModel | None = None  # The model in float32, where `model` is not.


# --- Who takes part -------------------------------------------------------------------------


def plain(work: Work, prompts: Sequence[Prompt], batch: int) -> dict[str, str]:
    replies = {}
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        texts = [written(work, prompt) for prompt in some]
        inputs = work.tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(work.model.device)
        output = work.model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=work.limit,
            do_sample=False,
            pad_token_id=work.tokenizer.pad_token_id,
            eos_token_id=work.model.generation_config.eos_token_id,
        )
        told = work.tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        replies |= {prompt.id: text.strip() for prompt, text in zip(some, told, strict=True)}
    return replies


def by_length(work: Work, prompts: Sequence[Prompt], batch: int) -> dict[str, str]:
    return plain(work, sorted(prompts, key=lambda prompt: len(work.tokenizer(written(work, prompt)).input_ids)), batch)


def plain_float32(work: Work, prompts: Sequence[Prompt], batch: int) -> dict[str, str]:
    if work.exact is None:
        raise ImportError("the others are float32", name="second model: the others are float32")
    return plain(work._replace(model=work.exact), prompts, batch)


def tasft(work: Work, prompts: Sequence[Prompt], batch: int) -> dict[str, str]:
    engine = TransformersEngine(work.model, work.tokenizer, "chat", batch)
    batches = engine.generate(requests_for(prompts), Sampling(work.limit), "prompts")
    return {reply.id: reply.completion for replies in batches for reply in replies}


def llama_cpp(work: Work, prompts: Sequence[Prompt], batch: int) -> dict[str, str]:
    """Its server, in this process, from the file of packed weights: it takes in a prompt where a reply has ended."""
    if work.llama is None:
        raise ImportError("llama.cpp reads a GGUF file", name="llama.cpp for a model without a GGUF file")
    server = work.llama(batch)

    def answer(prompt: Prompt) -> str:
        ids = work.tokenizer(written(work, prompt), add_special_tokens=False).input_ids
        # What it remembers of an earlier round would save it the prompts.
        asked = {"prompt": ids, "max_tokens": work.limit, "temperature": 0.0, "cache_prompt": False}
        told = server.handle_completions(asked)
        return str(told["choices"][0]["text"]).strip()

    with ThreadPoolExecutor(batch) as pool:
        return dict(zip([prompt.id for prompt in prompts], pool.map(answer, prompts), strict=True))


@cache
def llama_of(path: str, threads: int, batch: int) -> Any:
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = path
    asked.n_parallel = batch
    asked.n_ctx = CONTEXT * batch
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(asked)


def written(work: Work, prompt: Prompt) -> str:
    asked = [{"role": "user", "content": prompt.prompt}]
    text: str = work.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return text


class Contestant(NamedTuple):
    """How it answers, whether one prompt at a time, and what it is."""

    answer: Callable[[Work, Sequence[Prompt], int], dict[str, str]]
    alone: bool = False


CONTESTANTS = {
    PLAIN: Contestant(plain),
    "plain_alone": Contestant(plain, alone=True),
    "plain_by_length": Contestant(by_length),
    "plain_float32": Contestant(plain_float32),
    "tasft": Contestant(tasft),
    "llama_cpp": Contestant(llama_cpp),
}


# --- What is done ---------------------------------------------------------------------------


def mixed(count: int) -> list[Prompt]:
    """Different prompts of mixed lengths that ask for replies of mixed lengths, in a random order."""
    questions = [prompt.prompt for source in SOURCES for prompt in read_prompts(source)]
    chance = random.Random(0)
    prompts = []
    for index in range(count):
        *before, asked = chance.sample(questions, BEFORE[index % len(BEFORE)] + 1)
        head = (
            "These questions are answered already:\n" + "\n".join(before) + "\n\nAnswer this one:\n" if before else ""
        )
        prompts.append(Prompt(f"p{index}", head + asked + ENDINGS[index % len(ENDINGS)]))
    # The first of any number have all endings and lengths in equal parts.
    return prompts


def real(device: str, dtype: str) -> Work:
    packed = BUNDLED[MODEL]
    work = Work(
        load_model(MODEL, dtype).to(device),
        load_tokenizer(MODEL),
        mixed(1024 if device == "cuda" else 128),
        256,
        BATCH,
        partial(llama_of, str(packed.found() / packed.file), torch.get_num_threads()),
        None if dtype == "float32" else load_model(MODEL, "float32").to(device),
    )
    ends = {work.tokenizer.eos_token_id, work.model.generation_config.eos_token_id}
    for model in filter(None, (work.model, work.exact)):
        model.generation_config.eos_token_id = sorted(ends)
    return work


def made(device: str, dtype: str) -> Work:
    """A small model with random weights; several tokens end a reply, or few would end."""
    ends = ["<|end|>", "<|end 1|>", "<|end 2|>", "<|end 3|>"]
    special = [*ends, "<|user|>", "<|assistant|>"]
    # The last two are what a space and a new line are to it.
    letters = [*special, *map(chr, range(ord("!"), ord("~") + 1)), "\u0120", "\u010a"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=ends[0], pad_token=ends[0])
    fast.add_special_tokens({"additional_special_tokens": special[1:]})
    fast.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            initializer_range=0.3,  # Or every prompt would get the same reply.
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    model.generation_config.eos_token_id = list(range(len(ends)))
    return Work(model.to(device, getattr(torch, dtype)).eval(), fast, mixed(48), 64, 24)


def measure(work: Work, rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    replies: dict[str, dict[str, str]] = {}
    few = work.prompts[: len(work.prompts) // ALONE]
    reasons: dict[str, str] = {}
    for name, contestant in CONTESTANTS.items():
        try:
            contestant.answer(work._replace(limit=4), few, 1 if contestant.alone else work.batch)
        except ImportError as error:
            reasons[name] = f"no {error.name}"
    for turn in range(rounds):
        # There and back: what drifts steadily favours none.
        for name in [each for each in CONTESTANTS if each not in reasons][:: -1 if turn % 2 else 1]:
            alone = CONTESTANTS[name].alone
            print(f"round {turn + 1} of {rounds}: {name} ...", file=sys.stderr, flush=True)
            run = partial(CONTESTANTS[name].answer, work, few if alone else work.prompts, 1 if alone else work.batch)
            start = time.perf_counter()
            replies[name] = run()
            if work.model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return [
        {"contestant": name, "not_run": reasons[name]} if name in reasons else row(work, name, seconds, replies)
        for name in CONTESTANTS
    ]


def row(work: Work, name: str, seconds: dict[str, list[float]], replies: dict[str, dict[str, str]]) -> dict[str, Any]:
    told = replies[name]
    lengths = sorted(len(work.tokenizer(text, add_special_tokens=False).input_ids) for text in told.values())
    # Of contestants that answer a part of the prompts, too: the same prompts' replies by `plain`.
    same = sum(replies[PLAIN][prompt] == text for prompt, text in told.items())
    rates = [len(told) / each for each in seconds[name]]
    ratios = [rate * each / len(replies[PLAIN]) for rate, each in zip(rates, seconds[PLAIN], strict=True)]
    return {
        "contestant": name,
        "batch": 1 if CONTESTANTS[name].alone else work.batch,
        "replies": len(told),
        "seconds": seconds[name],
        "replies_per_s": statistics.median(rates),
        "tokens_per_s": statistics.median(sum(lengths) / each for each in seconds[name]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "reply_tokens": [lengths[0], statistics.median(lengths), lengths[-1]],
        "same_as_plain": same,
    }


# --- How it is told -------------------------------------------------------------------------

COLUMNS = ("contestant", "batch", "replies", "replies/s", "/ `plain`", "tokens/s", "same reply as `plain`")


def table(report: dict[str, Any]) -> str:
    """The report as a table in Markdown, with what it was measured on under it."""
    lines = [COLUMNS, ("---",) + ("--:",) * (len(COLUMNS) - 1)]
    lines += [(f"`{row['contestant']}`", *cells(row)) for row in report["rows"]]
    where, work = report["environment"], report["work"]
    shortest, middle, longest = next(row for row in report["rows"] if row["contestant"] == "tasft")["reply_tokens"]
    least, usual, most = work["prompt_tokens"]
    caption = (
        f"{work['model']}; prompts of {least} to {most} tokens (median {usual:g}), replies of {shortest} to {longest} "
        f"(median {middle:g}, limit {work['limit']}); {work['rounds']} rounds.\n{machine(where)}; {code(where)}."
    )
    return markdown(lines, caption)


def cells(row: dict[str, Any]) -> list[str]:
    if "not_run" in row:
        return [f"not run: {row['not_run']}"] + [""] * (len(COLUMNS) - 2)
    low, high = row["ratio_range"]
    return [
        str(row["batch"]),
        str(row["replies"]),
        number(row["replies_per_s"]),
        f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
        number(row["tokens_per_s"]),
        f"{row['same_as_plain']} of {row['replies']}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small made model, under a minute")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, help="by default 3, 2 if quick")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--page", type=Path, metavar="PATH", help="put the table between the marks of this page")
    args = parser.parse_args()
    logging.set_verbosity_error()
    work = (made if args.quick else real)(args.device, args.dtype)
    lengths = sorted(len(work.tokenizer(written(work, prompt)).input_ids) for prompt in work.prompts)
    rounds = args.rounds or (2 if args.quick else 3)
    report: dict[str, Any] = {
        "environment": environment(args.device, args.dtype, torch.get_num_threads()),
        "work": {
            "model": "made" if args.quick else MODEL,
            "prompt_tokens": [lengths[0], statistics.median(lengths), lengths[-1]],
            "limit": work.limit,
            "rounds": rounds,
        },
        "rows": measure(work, rounds),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    Console().print(Markdown(table(report)))
    if args.page:
        put(table(report), "generate", args.page)


if __name__ == "__main__":
    main()
