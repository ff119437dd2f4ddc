"""Encoded rows as people read them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tasft.core.text import visible
from tasft.data.encode import Row
from tasft.data.template import special_tokens
from tasft.loss.tokens import IGNORE_INDEX


def preview(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Text]:
    """Each encoded row as a text for people: a headline, then what the model reads, by role.

    The prompt is dim. What is learned stands between » and «, green in a row to imitate, red in one to
    avoid; a special token that is learned, as the end token is, stands underlined in square brackets.
    """
    special = special_tokens(tokenizer)
    for number, row in enumerate(rows):
        learned = [label != IGNORE_INDEX for label in row["labels"]]
        kind, colour = ("avoid", "red") if row["avoid"] else ("imitate", "green")
        weight = "" if row.get("weight", 1) == 1 else f", weight {row['weight']:g}"
        text = Text()
        text.append(
            f"row {number} ({kind}): {learned.count(False)} prompt + {learned.count(True)} label tokens{weight}\n",
            style="bold",
        )
        for ids, role in _runs(row["input_ids"], learned, special):
            written = visible(tokenizer.decode(ids))
            if role == "prompt":
                text.append(written, style="dim")
            elif role == "end":
                text.append(f"[{written}]", style=f"bold underline {colour}")
            else:
                text.append(f"»{written}«", style=colour)
        yield text.append("\n")


def _runs(
    input_ids: Sequence[int], learned: Sequence[bool], special: set[int]
) -> Iterator[tuple[list[int], Literal["prompt", "text", "end"]]]:
    """Neighbouring tokens of the same role, which must be decoded together: a letter may have several."""
    roles: list[Literal["prompt", "text", "end"]] = [
        "prompt" if not label else "end" if token in special else "text"
        for token, label in zip(input_ids, learned, strict=True)
    ]
    start = 0
    for stop in range(1, len(roles) + 1):
        if stop == len(roles) or roles[stop] != roles[start] or roles[start] == "end":
            yield list(input_ids[start:stop]), roles[start]
            start = stop
