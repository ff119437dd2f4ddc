"""The one exception that a user can fix."""

from collections.abc import Sequence

from tasft.core.redact import redacted


class UserError(Exception):
    """Something that the user can put right: shown without a traceback, exit code 2.

    Args:
        faults: One sentence, or all that were found. Each says what was found, where, and what to do; keys and
            passwords are taken out.
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = [redacted(fault) for fault in ([faults] if isinstance(faults, str) else faults)]
        super().__init__("\n".join(self.faults))
