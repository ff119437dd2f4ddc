"""Progress bars, also of libraries, as plain lines where there is no terminal; no warning that helps nobody."""

import os
import re
import sys
import warnings
from typing import Any, TextIO

# Read by tqdm when it is imported; what somebody has set already stays.
PLAIN = {
    "TQDM_MININTERVAL": "30",
    "TQDM_MAXINTERVAL": "60",
    "TQDM_DELAY": "1",
    "TQDM_BAR_FORMAT": "{desc}: {n_fmt} of {total_fmt} ({rate_fmt}, {remaining} left{postfix})",
}


class Lines:
    """A text stream that gives each state of a progress bar a line of its own.

    Args:
        stream: Where all goes in the end.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_bar = False
        self._count = ""

    def write(self, text: str) -> int:
        r"""Write text; what begins with `\r` would overwrite its line on a terminal, and gets a new one."""
        if "\r" in text or "\x1b[A" in text or (self._in_bar and not text.strip()):
            # A bar ends with an empty line feed, or is wiped out by spaces.
            for line in re.split(r"\r|\n|\x1b\[A", text):
                shown = re.sub(r"\( +", "(", line.strip())
                # Its end is written a second time when it is closed.
                if shown and shown.partition(" (")[0] != self._count:
                    self._count = shown.partition(" (")[0]
                    self._stream.write(f"{shown}\n")
            self._in_bar = "\n" not in text
        else:
            self._stream.write(text)
            self._in_bar, self._count = False, ""
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def plain_without_terminal() -> None:
    """Where stderr is no terminal: a line every half minute for what takes longer; call it before tqdm is imported."""
    if not sys.stderr.isatty():
        for name, value in PLAIN.items():
            os.environ.setdefault(name, value)
        sys.stderr = Lines(sys.stderr)


def without_needless_warnings() -> None:
    """Leave out what libraries warn of and no user could do anything about."""
    # Said at every checkpoint of a GGUF model, whose folder has no config.json; the vocabulary is not changed here.
    warnings.filterwarnings("ignore", message="Could not find a config file in")
    # Between transformers and peft.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
