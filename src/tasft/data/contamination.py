"""Prompts that are in an evaluation set too: what a model is measured on it must not be trained on."""

import random
import re
from collections.abc import Sequence

from datasketch import MinHash, MinHashLSH

SHINGLE = 5  # Characters.
SIMILARITY = 0.7
_PERMUTATIONS = 128
_LOOSE = 0.5  # Where the search looks, so that it overlooks hardly any pair at SIMILARITY.
_BLANKS = re.compile(r"\s+")


def overlapping(prompts: Sequence[str], held_out: Sequence[str]) -> list[bool]:
    """Of each prompt, whether one that is held out equals it or nearly does.

    Texts are compared in lower case, runs of white space as one blank. Nearly means that their sets of five-character
    pieces have a Jaccard similarity of at least 0.7: a word changed in a sentence, not a paraphrase. Candidates come
    from MinHash (Broder 1997) and locality-sensitive hashing, and are then compared exactly.
    """
    index = MinHashLSH(threshold=_LOOSE, num_perm=_PERMUTATIONS)
    pieces = [_pieces(text) for text in dict.fromkeys(held_out)]
    for number, hashed in enumerate(_hashed(pieces)):
        index.insert(number, hashed)
    own = [_pieces(text) for text in prompts]
    return [
        any(_similarity(mine, pieces[number]) >= SIMILARITY for number in index.query(hashed))
        for mine, hashed in zip(own, _hashed(own), strict=True)
    ]


def held_out(prompts: Sequence[str], share: float, seed: int) -> list[bool]:
    """Of each prompt, whether it is set aside: this share of them, with all that equal or nearly equal one of them.

    Groups of prompts that are near duplicates, as `overlapping` tells them, are set aside whole, in an order drawn with
    the seed, while they fit into the share.
    """
    index = MinHashLSH(threshold=_LOOSE, num_perm=_PERMUTATIONS)
    pieces = [_pieces(text) for text in prompts]
    leads: list[int] = []
    for number, hashed in enumerate(_hashed(pieces)):
        near = [at for at in index.query(hashed) if _similarity(pieces[number], pieces[at]) >= SIMILARITY]
        lead = min((leads[at] for at in near), default=number)
        # What is near to two groups joins them.
        joined = {leads[at] for at in near} - {lead}
        leads = [lead if old in joined else old for old in leads] if joined else leads
        leads.append(lead)
        index.insert(number, hashed)
    groups: dict[int, list[int]] = {}
    for number, lead in enumerate(leads):
        groups.setdefault(lead, []).append(number)
    wanted, chosen = round(share * len(prompts)), set[int]()
    for lead in random.Random(seed).sample(list(groups), len(groups)):
        if len(chosen) + len(groups[lead]) <= wanted:
            chosen.update(groups[lead])
    return [number in chosen for number in range(len(prompts))]


def _pieces(text: str) -> set[str]:
    plain = _BLANKS.sub(" ", text).strip().casefold()
    return {plain[start : start + SHINGLE] for start in range(max(1, len(plain) - SHINGLE + 1))}


def _hashed(pieces: Sequence[set[str]]) -> list[MinHash]:
    encoded = ([piece.encode() for piece in text_pieces] for text_pieces in pieces)
    return MinHash.bulk(encoded, num_perm=_PERMUTATIONS) if pieces else []


def _similarity(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)
