"""How well benign instructions are answered: AlpacaEval with an annotator, likelihoods without one.

AlpacaEval (Li et al. 2023; the length-controlled win rate Dubois et al. 2024, arXiv 2404.04475) has a language model
say which of two answers to an instruction is better, the model's or a reference's. Without an annotator nothing here
says how good an answer is: `reference_nll` is how likely the reference answers are to the model, `kl_to_before` how far
its predictions on them have moved. Both are named as what they are.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tasft.core import ranks
from tasft.core.errors import UserError
from tasft.core.provenance import atomic_write_text, file_hash, write_json, write_jsonl
from tasft.core.stats import Estimate, mean
from tasft.data.template import encode_prompt
from tasft.evaluate.references import Reference
from tasft.loss import Head, divergence, nll
from tasft.models.engine import Reply
from tasft.models.head import learn_tail
from tasft.models.local import TransformersEngine
from tasft.models.server_settings import Server


@dataclass(frozen=True, eq=False)
class Before:
    """What an earlier model makes of reference answers: its final hidden states, on the CPU, and its head.

    Attributes:
        hidden: Of each reference (T, D), where its T tokens are predicted; (0, D) when it is empty.
        head: Maps them to logits.
    """

    hidden: list[Tensor]
    head: Head


@dataclass(frozen=True)
class _Row:
    index: int
    prompt: list[int]
    answer: list[int]


def _rows(engine: TransformersEngine, references: Sequence[Reference]) -> list[_Row]:
    """Token ids of each, the shortest first."""
    rows = []
    for index, row in enumerate(references):
        prompt = encode_prompt(
            engine.tokenizer, row.instruction, engine.style, chat_template_kwargs=engine.chat_template_kwargs
        )
        rows.append(_Row(index, prompt, engine.tokenizer(row.output, add_special_tokens=False).input_ids))
    return sorted(rows, key=lambda row: len(row.prompt) + len(row.answer))


def _head(engine: TransformersEngine, references: Sequence[Reference]) -> Head:
    """The map from those states to logits."""
    return learn_tail(engine.model, _rows(engine, references[:1])[0].prompt).head(engine.model)


def _hidden(engine: TransformersEngine, references: Sequence[Reference]) -> Iterator[tuple[_Row, Tensor]]:
    """Each reference with the (T, D) states that its T tokens are predicted from, in order of length."""
    rows = _rows(engine, references)
    together = max(1, engine.batch_size // 8)
    seen: list[Tensor] = []
    hook = engine.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for start in tqdm(range(0, len(rows), together), desc="reference answers", disable=not ranks.is_first()):
            batch = rows[start : start + together]
            ids = pad_sequence([torch.tensor(row.prompt + row.answer) for row in batch], batch_first=True)
            mask = pad_sequence([torch.ones(len(row.prompt + row.answer), dtype=torch.long) for row in batch], True)
            device = engine.model.device
            first = min(len(row.prompt) for row in batch)
            keep = ids.shape[1] - first + 1
            engine.model(input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=keep)
            # states[k] predicts the token at position first + k; some models make those of all positions.
            for row, states in zip(batch, seen.pop()[:, -keep:], strict=True):
                begin = len(row.prompt) - first
                yield row, states[begin : begin + len(row.answer)]
    finally:
        hook.remove()


@torch.inference_mode()
def remember(engine: TransformersEngine, references: Sequence[Reference]) -> Before:
    """What `measure` compares a later model with.

    Memory: a number of the width for each token of the answers; 805 answers of AlpacaEval are about 60,000 tokens,
    0.5 GB in bfloat16 for a width of 4096.
    """
    kept = {row.index: states.cpu() for row, states in _hidden(engine, references)}
    return Before([kept[index] for index in range(len(references))], _head(engine, references))


@torch.inference_mode()
def measure(
    engine: TransformersEngine,
    references: Sequence[Reference],
    folder: Path,
    about: dict[str, Any],
    before: Before | None = None,
) -> dict[str, Any]:
    """Likelihood of reference answers and movement on them, in `items.jsonl` and `summary.json`.

    - `reference_nll`: mean loss of the answer's tokens given its prompt, in nats per token. Less is not better
      writing: a model that was tuned on such answers has less.
    - `reference_perplexity`: exp of it and of its interval, above 0; None where it is beyond a number.
    - `kl_to_before`: mean of KL(before || now) over the same tokens, in nats per token, in [0, inf). n = 0 without
      `before`.

    Each is a mean over prompts, so that long answers do not weigh more, with Student's interval; n counts prompts.
    Empty answers are left out.

    Args:
        engine: The model.
        references: What it is shown.
        folder: For the two files.
        about: What else the summary says: recipe, commit.
        before: The model that it is compared with.
    """
    head = _head(engine, references)
    items: list[dict[str, Any]] = [
        {"id": row.id, "tokens": 0, "reference_nll": None, "kl_to_before": None} for row in references
    ]
    for row, states in _hidden(engine, references):
        if not row.answer:
            continue
        labels = torch.tensor(row.answer, device=states.device)
        sums = {"reference_nll": nll(states, head, labels)}
        if before:
            earlier = before.hidden[row.index].to(states.device)
            sums["kl_to_before"] = divergence(states, head, labels, before=earlier, head_before=before.head)
        items[row.index] |= {"tokens": len(row.answer)}
        items[row.index] |= {name: float(token_sum.total) / int(token_sum.count) for name, token_sum in sums.items()}
    estimates = {
        name: asdict(mean([item[name] for item in items if item[name] is not None]))
        for name in ("reference_nll", "kl_to_before")
    }
    likely = estimates["reference_nll"]
    perplexity = {key: value if key == "n" or value is None else _exp(value) for key, value in likely.items()}
    summary = {**estimates, "reference_perplexity": perplexity, "unit": "nats per token", **about}
    if ranks.is_first():
        write_jsonl(folder / "items.jsonl", items)
        write_json(folder / "summary.json", summary)
    return summary


def _exp(nats: float) -> float | None:
    try:
        return math.exp(nats)
    except OverflowError:  # Beyond what a number can hold, as of a model that has collapsed.
        return None


def annotator_config(name: str, server: Server | None) -> dict[str, Any]:
    """An annotator of alpaca_eval, by its name or a folder with `configs.yaml`; on a server if one is given.

    Raises:
        UserError: alpaca_eval is not installed, has no such annotator, or the server has several addresses.
    """
    level = logging.getLogger().level
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "pkg_resources")
            from alpaca_eval import annotators, constants  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"evaluate.quality.annotator needs {error.name}, which is missing: pip install '.[quality]'"
        ) from None
    logging.getLogger().setLevel(level)  # It makes every library talk.
    path = constants.EVALUATORS_CONFIG_DIR / name / "configs.yaml"  # A path from the root replaces what is before it.
    if not path.is_file():
        known = sorted(file.parent.name for file in constants.EVALUATORS_CONFIG_DIR.glob("*/configs.yaml"))
        raise UserError(
            f"evaluate.quality.annotator.config: {name!r} is neither a folder with configs.yaml nor an annotator of "
            f"alpaca_eval: {', '.join(known)}"
        )
    try:
        (config,) = yaml.safe_load(path.read_text(encoding="utf-8")).values()
        own_code = "trust_remote_code" in yaml.safe_dump(config)
        # A relative path is meant from the folder that holds all annotators.
        config["prompt_template"] = str((path.parents[1] / config["prompt_template"]).resolve())
        config["fn_completions"], config["completions_kwargs"]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"evaluate.quality.annotator.config: {path}: no annotator of alpaca_eval ({reason:.100})"
        ) from None
    if own_code:
        raise UserError(
            f"evaluate.quality.annotator.config: {name} sets trust_remote_code: no annotator may run code of its own; "
            "give one without it, or a server"
        )
    if server is not None:
        if len(server.urls) > 1:
            raise UserError("evaluate.quality.annotator.server: one address, since alpaca_eval asks only one")
        if config["fn_completions"] != "openai_completions":
            raise UserError(
                f"evaluate.quality.annotator: {name} does not speak OpenAI's protocol, so server cannot take its "
                "place: use weighted_alpaca_eval_gpt4_turbo or alpaca_eval_clf_gpt4_turbo"
            )
        config["completions_kwargs"] |= {"model_name": server.model, "requires_chatml": True, **server.body}
    return config


def annotator_files(name: str) -> dict[str, str]:
    """Hash of each file of an annotator that is a folder; empty for one of alpaca_eval's own."""
    folder = Path(name)
    return {str(path.relative_to(folder)): file_hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def annotate(
    references: Sequence[Reference],
    replies: Sequence[Reply],
    name: str,
    server: Server | None,
    folder: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    """AlpacaEval: how often an annotator prefers the model's replies to the references.

    In `items.jsonl`, `summary.json`, and alpaca_eval's own `annotations.json`, which grows as answers come.

    - `win_rate`: mean preference for the model in [0, 1], a draw is 0.5; Student's interval.
    - `length_controlled_win_rate`: what alpaca_eval's regression expects if both answers were equally long, without
      an interval. It needs a file on the hub, else n = 0, and `note` says why. Rows must be AlpacaEval's 805
      instructions in their order, or the first of them: it takes row k for instruction k.

    Args:
        references: What the replies are compared with.
        replies: To each of them, in the same order.
        name: The annotator, see `annotator_config`.
        server: Where it runs, instead of where its configuration says.
        folder: For the files.
        about: What else the summary says: recipe, commit.

    Raises:
        UserError: As `annotator_config`, or the annotator does not answer.
    """
    config = annotator_config(name, server)
    import openai
    from alpaca_eval.annotators import PairwiseAnnotator
    from pandas import isna

    path = folder / "annotator" / "configs.yaml"
    atomic_write_text(path, yaml.safe_dump({"annotator": config}))
    judge = PairwiseAnnotator(annotators_config=path.absolute(), caching_path=folder / "annotations.json")
    sides = ([row.output for row in references], [reply.completion for reply in replies])
    reference, model = (
        [
            {"instruction": row.instruction, "output": text, "generator": who}
            for row, text in zip(references, texts, strict=True)
        ]
        for who, texts in zip((references[0].generator, "model"), sides, strict=True)
    )
    try:
        annotations = judge.annotate_head2head(reference, model, is_ordered=True, **_asked(server))
    except openai.OpenAIError as error:
        raise UserError(f"evaluate.quality.annotator: {type(error).__name__}: {error!s:.300}") from error
    # It gives them in another order, and a pair that is there twice once.
    by_texts = {(row["instruction"], row["output_1"], row["output_2"]): row for row in annotations}
    rows = [by_texts[row.instruction, mine, other] for row, mine, other in zip(references, *sides, strict=True)]
    # 1 is the reference, 2 the model; what could not be read is None or nan.
    preferences = [None if isna(row["preference"]) else float(row["preference"]) - 1 for row in rows]
    wins = [preference for preference in preferences if preference is not None]
    items = [{"id": row.id, "preference": preference} for row, preference in zip(references, preferences, strict=True)]
    controlled, note = _length_controlled(rows)
    summary = {
        "win_rate": asdict(mean(wins)),
        "length_controlled_win_rate": asdict(controlled),
        **({"note": note} if note else {}),
        "unreadable": len(items) - len(wins),
        "annotator": name,
        "annotator_model": config["completions_kwargs"].get("model_name"),
        "reference": references[0].generator,
        "alpaca_eval": metadata.version("alpaca_eval"),
        **about,
    }
    write_jsonl(folder / "items.jsonl", items)
    write_json(folder / "summary.json", summary)
    return summary


def _asked(server: Server | None) -> dict[str, Any]:
    """What alpaca_eval's requests take; the key goes into no file."""
    if server is None:
        return {}
    return {
        "openai_api_base": server.urls[0],
        "openai_api_keys": server.key() or "none",
        "num_procs": server.concurrency,
        "client_kwargs": {"timeout": server.timeout_s, "max_retries": server.retries},
    }


def _length_controlled(rows: Sequence[dict[str, Any]]) -> tuple[Estimate, str]:
    """The length-controlled win rate in [0, 1], or why there is none."""
    from alpaca_eval.metrics import get_length_controlled_winrate
    from pandas import DataFrame

    frame = DataFrame(rows)  # Row k is taken for AlpacaEval's instruction k.
    frame = frame[frame["preference"].notna()]
    try:
        figures = get_length_controlled_winrate(frame, save_weights_dir=None)
    except Exception as error:  # the hub's and the regression's faults share no base class
        reason = next(iter(str(error).splitlines()), "")
        return Estimate(None, None, None, 0), f"no length-controlled win rate: {type(error).__name__}: {reason:.200}"
    # Its standard error is the spread of what was fitted, without the fit's own uncertainty: no interval comes of it.
    return Estimate(float(figures["length_controlled_winrate"]) / 100, None, None, len(frame)), ""
