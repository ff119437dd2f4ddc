"""The file of the judge `classifier`: what it holds, and how it is read without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from tasft.core.errors import UserError
from tasft.judges.encoder import WIDTH

Floats = NDArray[np.float32]

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
FORMAT = 2
HEADS = ("harmful", "complies", "declines", "partial", "broken", "rambling")
FEATURES = (*HEADS, "asks", "phrases", "incoherent", "words", "overlap")
"""What an outcome is told by: log-odds of the heads, of "asks for harm" by the prompt alone, and `of_text`."""
OUTCOMES = ("harmful", "declines", "partial", "broken", "rambling")
FIRST_CHANGED = 0  # Layer, of six from 0 on.
PROMPT_TOKENS = 64
REPLY_TOKENS = 160
MAX_WINDOWS = 8
BATCH = 32
MAX_KNOWN = 20_000
MOST = MAX_WINDOWS * REPLY_TOKENS
TOKEN_CHARACTERS = 12  # No more of a text is tokenised than so many for each token that may be read.


def read(path: Path) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Settings and tensors of a file of weights.

    Raises:
        UserError: It is missing, damaged or of another format.
    """
    try:
        with safe_open(path, "np") as file:
            settings = json.loads((file.metadata() or {}).get("judge", "{}"))
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118  # no mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: install tasft again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if settings.get("version") != FORMAT or list(settings.get("features", ())) != list(FEATURES):
        raise UserError(
            f"{path}: its format is {settings.get('version')!r}, and this version of tasft reads {FORMAT}: install "
            "tasft and the file from the same release"
        )
    shapes = {"pair.weight": (len(HEADS), 3 * WIDTH), "mix.weight": (len(OUTCOMES), len(FEATURES))}
    if any(name not in tensors or tensors[name].shape != shape for name, shape in shapes.items()) or not all(
        np.isfinite(tensor).all() for tensor in tensors.values()
    ):
        raise damaged(path, "weights of another shape, or that are no numbers")
    return settings, tensors


def damaged(path: Path, detail: str) -> UserError:
    """What is said of a file of weights that does not load."""
    return UserError(
        f"{path}: damaged ({detail:.100}): install tasft again: pip install --force-reinstall --no-deps tasft"
    )
