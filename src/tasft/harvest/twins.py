"""Benign twins: prompts with the opening words of toxic ones, which the model writes itself.

What makes a tuned model refuse too much are harmless cues of toxic prompts, their openings above all (2026, arXiv
2603.11388). A chat model that is given the beginning of a user's message goes on as users do (Xu et al. 2024, Magpie,
arXiv 2406.08464), and most of what users ask is benign.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tasft.core import ranks
from tasft.core.provenance import append_jsonl, resume_jsonl
from tasft.data.rows import Prompt
from tasft.data.settings import PromptFormat
from tasft.data.template import ALPACA, asked
from tasft.judges.encoder import encoder, is_here
from tasft.models.engine import Engine, Sampling

OPENINGS = (3, 2, 4, 5)  # Words of a toxic prompt that are kept, of one twin after the other.
TEMPERATURE = 1.0  # Twins should differ.
TOKENS = 24
MORE = 3  # Words that a twin has beyond its opening, at least.
NEAREST = 0.7  # Cosine to a toxic prompt from which a twin is taken for toxic itself.
ROUND = 128


def opened(
    tokenizer: PreTrainedTokenizerBase,
    opening: str,
    style: PromptFormat,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Text of a conversation up to where a user who has said `opening` goes on.

    Args:
        tokenizer: Of the model.
        opening: First words of the user's message.
        style: How it is written.
        chat_template_kwargs: Given to the chat template.
    """
    if style == "alpaca":
        return ALPACA.partition("{instruction}")[0] + opening
    text: str = tokenizer.apply_chat_template(
        asked(opening), tokenize=False, continue_final_message=True, **(chat_template_kwargs or {})
    )
    return text


def twins(
    engine: Engine,
    toxic: Sequence[Prompt],
    count: int,
    opened: Callable[[str], str],
    sampling: Sampling,
    path: Path,
) -> tuple[list[Prompt], dict[str, int]]:
    """Benign prompts that share their opening words with toxic ones.

    Args:
        engine: Writes them.
        toxic: Prompts whose openings are used.
        count: Twins to each that are tried.
        opened: The text of a conversation up to where a user who has said some words goes on.
        sampling: Its nucleus and seed are used.
        path: Gets what was written, a line each; taken up where it was left.

    Returns:
        Twins: whole sentences, none twice, none near to a toxic prompt; and how many were written and left out.
    """
    wanted = [
        (f"{prompt.id}-twin{number}", " ".join(prompt.prompt.split()[: OPENINGS[number % len(OPENINGS)]]))
        for number in range(count)
        for prompt in toxic
    ]
    have = {row["id"]: row["prompt"] for row in resume_jsonl(path)}
    ranks.wait()  # All have read before the first writes.
    for start in range(0, len(wanted), ROUND):
        part = [each for each in wanted[start : start + ROUND] if each[0] not in have]
        if not part:
            continue
        drawn = replace(sampling, max_new_tokens=TOKENS, temperature=TEMPERATURE, seed=sampling.seed + start)
        texts = engine.complete([opened(opening) for _, opening in part], drawn)
        new = {
            name: f"{opening}{text}".split("\n", 1)[0].strip()
            for (name, opening), text in zip(part, texts, strict=True)
        }
        if ranks.is_first():
            append_jsonl(path, [{"id": name, "prompt": text} for name, text in new.items()])
        have |= new
    found: dict[str, Prompt] = {}
    for name, opening in wanted:
        text = have[name]
        if text.endswith((".", "?", "!")) and len(text.split()) >= len(opening.split()) + MORE:
            found.setdefault(text.casefold(), Prompt(name, text))
    whole = list(found.values())
    kept = _apart(whole, toxic)
    return kept, {"written": len(wanted), "unfit": len(wanted) - len(whole), "near": len(whole) - len(kept)}


def _apart(twins: list[Prompt], toxic: Sequence[Prompt]) -> list[Prompt]:
    """Those that are near to no toxic prompt, as far as there is an encoder that can tell."""
    if not twins or not is_here():
        return twins
    ones, others = ([prompt.prompt for prompt in part] for part in (twins, toxic))
    near = (encoder()(ones) @ encoder()(others).T).max(axis=1)
    return [twin for twin, cosine in zip(twins, near, strict=True) if cosine < NEAREST]
