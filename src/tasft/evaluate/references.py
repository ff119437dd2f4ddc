"""Instructions with somebody's answers: what models are asked and compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

from tasft.core.errors import UserError
from tasft.data.cells import plain
from tasft.data.forms import looks_like_talk
from tasft.data.rows import Prompt, fault_of_input, with_input
from tasft.data.sources import read_source

# What files call the two columns; the first is AlpacaEval's.
_PROMPTS, _ANSWERS = ("instruction", "prompt"), ("output", "completion")


@dataclass(frozen=True)
class Reference:
    """An instruction and somebody's answer to it, AlpacaEval's `text_davinci_003` for one."""

    id: str
    instruction: str
    output: str
    generator: str


def read_references(source: str, limit: int | None = None) -> list[Reference]:
    """Instructions with reference answers, in their order; `output` may be empty.

    Args:
        source: As `read_source` takes it; rows have `instruction` and `output`, as AlpacaEval's `model_outputs.json`,
            or `prompt` and `completion`; and perhaps `input`, which follows the instruction.
        limit: How many from the beginning; None for all.

    Raises:
        UserError: Names every bad row.
    """
    loaded = read_source(source)
    references, faults = [], []
    for number, row in loaded.rows:
        texts = [next((row[name] for name in names if name in row), None) for names in (_PROMPTS, _ANSWERS)]
        for text, names in zip(texts, (_PROMPTS, _ANSWERS), strict=True):
            if not isinstance(text, str) or looks_like_talk(text) or (names is _PROMPTS and not text.strip()):
                faults.append(f'{loaded.at(number)}: "{names[0]}" (or "{names[1]}") must be text, found {text!r:.40}')
        context = plain(row.get("input")) or ""
        if fault := fault_of_input(context, texts[0]):
            faults.append(f"{loaded.at(number)}: {fault}")
        instruction, output = with_input(str(texts[0]), context), str(texts[1])
        references.append(Reference(str(number), instruction, output, str(row.get("generator", "reference"))))
    if faults:
        raise UserError(faults)
    return references[:limit]


def prompts_of(references: Sequence[Reference]) -> list[Prompt]:
    """The instructions alone."""
    return [Prompt(row.id, row.instruction) for row in references]
