"""The one exception that a user can fix."""

import re
from collections.abc import Sequence

from tasft.core.redact import redacted

_PLACED = re.compile(r"(?P<place>[^\n]+?:\d+): (?P<sentence>.+)", re.DOTALL)
_VALUES = re.compile(r"'[^']*'|\d+")
_SAID_EACH = 3


def grouped(faults: Sequence[str]) -> list[str]:
    """Faults of rows that say the same, but for a value, as one of all these rows; others as they are.

    A file of 800 rows without a prompt has one fault.
    """
    alike: dict[str, list[str]] = {}
    for fault in faults:
        placed = _PLACED.fullmatch(fault)
        alike.setdefault(_VALUES.sub("'", placed["sentence"]) if placed else fault, []).append(fault)
    lines = []
    for same in alike.values():
        placed = _PLACED.fullmatch(same[0])
        if placed is None or len(same) <= _SAID_EACH:
            lines += same
        else:
            lines.append(f"{len(same):,} rows, first {placed['place']}: {placed['sentence']}")
    return lines


class UserError(Exception):
    """Something that the user can put right: shown without a traceback, exit code 2.

    Args:
        faults: One sentence, or all that were found. Each says what was found, where, and what to do; keys and
            passwords are taken out, and those of more than three rows that are alike become one.
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = [redacted(fault) for fault in ([faults] if isinstance(faults, str) else grouped(faults))]
        super().__init__("\n".join(self.faults))
