"""Standard output and error that end no command: nobody may read them, and they may take few letters."""

import errno
import os
import sys
from typing import Any, TextIO


class Lasting:
    """A text stream that drops what cannot be written, and letters that its encoding lacks become their numbers.

    Args:
        stream: Where all goes; None, where the descriptor is closed, is nowhere.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: Any = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.error: OSError | None = None
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written, if that can be done."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = self.error or error
        # What is left, and what Python writes when it ends, goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    @property
    def lost(self) -> str | None:
        """Why something that was written is lost; None where it is not, or where the reader went away."""
        self.flush()
        if self.error is None or self.error.errno == errno.EPIPE:
            return None
        return self.error.strerror

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def last() -> Lasting:
    """Let both streams last; standard output, to be asked in the end what it lost."""
    out, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    sys.stdout = out
    return out
