"""From encoded rows to what one forward pass takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tasft.loss.tokens import IGNORE_INDEX

Batch = dict[str, Tensor]

# What fills the place of tokens that are not there.
_FILLERS = {"labels": IGNORE_INDEX, "avoid": False, "retain": False, "segments": -1, "weight": 0.0} | dict.fromkeys(
    ("margins", "reference"), 0.0
)


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int, padding_free: bool = False) -> Batch:
    """Lay rows side by side, padded on the right, or end to end.

    Args:
        rows: As `encode_rows` gives them, perhaps with what a penalty needs of the reference model, `margins` or
            `reference` (a number for each token).
        pad_token_id: Fills `input_ids`; it is masked, so any id will do.
        padding_free: Lay them end to end. `position_ids`, which begin anew with each row, keep them apart.

    Returns:
        Tensors of B rows and T positions, or of one row and a position for each token: `input_ids`, `labels`,
        `avoid` (whether the row is to be avoided), `segments` (number of the row, -1 for padding), if given `retain`,
        `weight`, `margins` and `reference`; and `attention_mask` or `position_ids`.
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
    if padding_free:
        return {name: torch.cat(parts).unsqueeze(0) for name, parts in columns.items()}
    fillers = _FILLERS | {"input_ids": pad_token_id, "position_ids": 0}
    batch = {
        name: pad_sequence(parts, batch_first=True, padding_value=fillers[name]) for name, parts in columns.items()
    }
    del batch["position_ids"]
    return batch | {"attention_mask": (batch["segments"] >= 0).long()}
