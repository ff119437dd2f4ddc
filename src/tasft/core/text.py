"""Text that a model or a user wrote, made fit to be shown or to be kept in a table."""

import csv
import unicodedata
from collections.abc import Iterable, Sequence
from io import StringIO

# What a reader cannot see, or what moves the text around it: controls, formats (bidi, zero width,
# soft hyphen, tags), lone surrogates, line and paragraph separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class _Shown(dict[int, str]):
    """Code point -> what stands for it; each is looked up once, for a report shows millions of characters."""

    def __missing__(self, code: int) -> str:
        self[code] = f"⟨U+{code:04X}⟩" if unicodedata.category(chr(code)) in _HIDDEN else chr(code)
        return self[code]


_SHOWN = _Shown({ord("\n"): "\n", ord("\t"): "\t"})


def visible(text: str) -> str:
    r"""Each character that hides or moves text becomes its number, as in `⟨U+202E⟩`.

    `\n` and `\t` stay. The result can always be encoded in UTF-8, and does nothing to a terminal.
    """
    return text.translate(_SHOWN)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV, whatever stands in their cells; None is an empty one.

    Lines end as RFC 4180 says: with another end, csv of Python 3.11 leaves a carriage return in a cell unquoted.
    """
    out = StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()
