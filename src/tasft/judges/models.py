"""Models of judges that run in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasft.core.errors import UserError
from tasft.models.load import fingerprint, load_model, load_tokenizer, locate


@contextmanager
def naming(judge: str) -> Iterator[None]:
    """Within, a fault of a model names the judge that wants it, and what would help."""
    try:
        yield
    except UserError as error:
        raise UserError(
            [
                f"judge {judge}: {fault.removeprefix('model.base: ')}. Give the judge a `model` that is there, such as "
                "a folder, or a `server` if it can be asked through one"
                for fault in error.faults
            ]
        ) from error


def find(judge: str, model: str) -> list[Any]:
    """What tells a model from others, found without loading a weight.

    Raises:
        UserError: It is not there.
    """
    with naming(judge):
        locate(model)
    return [fingerprint(model) or model]


def load(judge: str, model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model and its tokenizer, in bfloat16 on a GPU and in float32 without one.

    Raises:
        UserError: It does not load.
    """
    with naming(judge):
        return load_model(model, "bfloat16" if torch.cuda.is_available() else "float32"), load_tokenizer(model)
