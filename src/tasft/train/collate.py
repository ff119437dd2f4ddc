"""From encoded rows to what one forward pass takes."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tasft.loss.tokens import IGNORE_INDEX
from tasft.models.generation import common_beginning

Batch = dict[str, Tensor]

Layout = Literal["padded", "end_to_end", "shared"]
"""How the rows of a batch lie: side by side; end to end; so that what all begin with is there once."""

# What fills the place of tokens that are not there.
_FILLERS = {"labels": IGNORE_INDEX, "avoid": False, "retain": False, "segments": -1, "weight": 0.0} | dict.fromkeys(
    ("margins", "reference"), 0.0
)

WORTH = 64  # Tokens that are saved where a beginning stands once, for which a mask of all by all is made.


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int, layout: Layout = "padded") -> Batch:
    """Lay rows side by side, padded on the right, or end to end.

    Args:
        rows: As `encode_rows` gives them, perhaps with what a penalty needs of the reference model, `margins` or
            `reference` (a number for each token).
        pad_token_id: Fills `input_ids`; it is masked, so any id will do.
        layout: `end_to_end` keeps rows apart by `position_ids`, which begin anew with each. `shared` leaves what all
            begin with to the first alone, where that saves enough, and lets the others look back to it by a mask.

    Returns:
        Tensors of B rows and T positions, or of one row and a position for each token: `input_ids`, `labels`,
        `avoid` (whether the row is to be avoided), `segments` (number of the row, -1 for padding), if given `retain`,
        `weight`, `margins` and `reference`; and `attention_mask` (B, T), or `position_ids` with, where a beginning is
        shared, `attention_mask` (1, 1, T, T; true where the first position looks at the second).
    """
    names = ["input_ids", "labels", "avoid", "segments", "position_ids"]
    names += [name for name in ("retain", "weight", "margins", "reference") if name in rows[0]]
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        spread = {"segments": number} | {name: row[name] for name in ("avoid", "retain", "weight") if name in row}
        for name, parts in columns.items():
            if name == "position_ids":
                parts.append(torch.arange(length))
            else:
                parts.append(torch.full((length,), spread[name]) if name in spread else torch.tensor(row[name]))
    if layout != "padded":
        shared = _shared(rows) if layout == "shared" else 0
        batch = {
            name: torch.cat([part[shared if number else 0 :] for number, part in enumerate(parts)]).unsqueeze(0)
            for name, parts in columns.items()
        }
        return batch | ({"attention_mask": _mask(batch["segments"][0], shared)} if shared else {})
    fillers = _FILLERS | {"input_ids": pad_token_id, "position_ids": 0}
    batch = {
        name: pad_sequence(parts, batch_first=True, padding_value=fillers[name]) for name, parts in columns.items()
    }
    del batch["position_ids"]
    return batch | {"attention_mask": (batch["segments"] >= 0).long()}


def _shared(rows: Sequence[dict[str, Any]]) -> int:
    """How many tokens at their beginning rows have in common and no label is learned at or right after; 0 if few."""
    labels = [[label != IGNORE_INDEX for label in row["labels"]] for row in rows]
    asked = min(counts.index(True) if any(counts) else len(counts) for counts in labels)
    shared = max(0, min(common_beginning([list(row["input_ids"]) for row in rows]), asked - 1))
    return shared if shared * (len(rows) - 1) >= WORTH else 0


def _mask(segments: Tensor, shared: int) -> Tensor:
    """Which position looks at which: at earlier ones of its row, and at the beginning of the first row."""
    position = torch.arange(len(segments))
    own = segments[:, None] == segments
    return ((own | (position < shared)) & (position <= position[:, None]))[None, None]
