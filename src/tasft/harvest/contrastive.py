"""Prompts that only seem toxic, and their answers: rows to imitate against over-refusal.

Source: Lu, Sinha, Varakantham 2024 (arXiv 2412.06843), section 4.3.6, in the manner of OR-Bench (Cui et al. 2024,
arXiv 2405.20947). The paper finds that such rows make the tuned model less safe: measure both sides.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasft.data.rows import Prompt
from tasft.harvest.settings import Contrastive
from tasft.models.engine import Engine, Reply, Request, Sampling, collect

REQUEST = (
    "Write one short question that a benign, well-meaning person could ask. It must contain the word "
    '"{word}" and may sound alarming at first sight, but it must be harmless, and a helpful answer to it must harm '
    "nobody. Reply with the question alone."
)
TEMPERATURE = 1.0  # Of the questions: k of them to a word should differ.
_WORD = re.compile(r"[^\W\d_]{3,}(?:['’-][^\W\d_]+)*")
_PRIOR = 0.5  # Occurrences that each word has beforehand, in each of the two kinds of prompts.
_TYPICAL = 1.0  # Standard errors.


def toxic_words(toxic: Sequence[str], benign: Sequence[str], count: int) -> list[str]:
    """Words that are typical of toxic prompts, most typical first.

    The score of a word is the difference of its log-odds in toxic and benign prompts over its standard error; words
    at 1 or less are left out. A prompt counts a word once.

    Args:
        toxic: Prompts whose words are looked for.
        benign: Prompts whose words are not meant.
        count: Most words that are given.

    Source: Monroe, Colaresi, Quinn 2008, "Fightin' Words", Eq. 16 and 22, with a flat prior.
    """
    one, other = (Counter(word for text in texts for word in _words(text)) for texts in (toxic, benign))
    prior = _PRIOR * len(one | other)

    def score(word: str) -> float:
        odds, variance = 0.0, 0.0
        for sign, counts in ((1, one), (-1, other)):
            smoothed = counts[word] + _PRIOR
            odds += sign * math.log(smoothed / (counts.total() + prior - smoothed))
            variance += 1 / smoothed
        return odds / math.sqrt(variance)

    scores = {word: score(word) for word in one}
    typical = [word for word in one if scores[word] > _TYPICAL]
    return sorted(typical, key=lambda word: (-scores[word], word))[:count]


def _words(text: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(text)}


def contrastive_replies(
    writer: Engine,
    toxic: Sequence[Prompt],
    benign: Sequence[Prompt],
    wanted: Contrastive,
    sampling: Sampling,
    path: Path,
) -> tuple[list[Reply], dict[str, Any]]:
    """Answers to prompts that contain a toxic word and mean no harm, both written by an engine.

    Args:
        writer: Who writes and answers.
        toxic: Prompts whose words are used.
        benign: Prompts that show which words are not toxic.
        wanted: How many.
        sampling: Of the answers.
        path: The `replies.jsonl` that they are appended to.

    Returns:
        Answers that still have to be judged; and the words, how many prompts were written, and how many did not
        hold their word or were there already.
    """
    words = toxic_words([prompt.prompt for prompt in toxic], [prompt.prompt for prompt in benign], wanted.words)
    requests = [
        Request(f"{word}-contrast#{sample}", REQUEST.format(word=word), "", sample)
        for word in words
        for sample in range(wanted.per_word)
    ]
    written = collect(writer, requests, replace(sampling, temperature=TEMPERATURE), path, "contrast")
    prompts: dict[str, Request] = {}
    for reply, word in zip(written, (word for word in words for _ in range(wanted.per_word)), strict=True):
        first = next((line.strip(" \t\"'“”*") for line in reply.completion.splitlines() if line.strip()), "")
        if word in _words(first):
            prompts.setdefault(first, Request(reply.id.replace("-contrast", "-contrastive"), first))
    answers = collect(writer, list(prompts.values()), sampling, path, "contrastive")
    return answers, {"words": words, "written": len(written), "unfit": len(written) - len(prompts)}
