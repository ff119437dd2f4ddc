"""The map from a model's final hidden states to its logits, learned from the model itself.

The losses never make logits for all positions: they read the output head. What a model does to the products of its
head is in its code and not in the names of its settings: `logits_scaling` divides in Granite, multiplies in
HyperCLOVA-X, and in MiniCPM3 is done before the head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tasft.core.errors import UserError
from tasft.loss import Head

# Products that a model is given in place of those of its head: about 0 they show the scale, far from it the bound.
_SLOPE, _FAR = 2.0**-20, 2.0**20
_PROBES = (0.0, *(sign * size for size in (_SLOPE, 0.5, 3.0, 12.0, 50.0, 200.0, _FAR) for sign in (1, -1)))

# Digits that a product in this type has, and the share of the largest number that rounding explains.
_DIGITS = {torch.float64: 12, torch.float32: 6}
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3}

_SAMPLE = 4096  # Tokens of the vocabulary that are compared.


@dataclass(frozen=True)
class Tail:
    """What a model does to the products of its output head.

        logits = product * scale, or softcap * tanh(product * scale / softcap)

    Attributes:
        scale: Above 0.
        softcap: Bound on the size of a logit; None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def head(self, model: Any) -> Head:
        """The map as it is now, from the weights of the model, which may be trained."""
        module = model.get_output_embeddings()
        return Head(module.weight, module.bias, self.scale, self.softcap)


@contextmanager
def replaced_head(model: Any, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, the output head hands its hidden states (B, T, D) to `function`, which makes what the head would.

    The function runs inside the model's own forward, where sharded weights are gathered and hooks fire.
    """
    with replaced_forward(model.get_output_embeddings(), function):
        yield


@contextmanager
def replaced_forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Within, a module does what `function` does; a `forward` of its own, as accelerate's hooks set, comes back."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@torch.no_grad()
def learn_tail(model: Any, ids: Sequence[int]) -> Tail:
    """Look at what a model makes of products of its head, and whether its logits are all that the losses will see.

    Costs two forward passes over `ids`.

    Args:
        model: A causal language model; an adapter may be on it.
        ids: Tokens of a real prompt, at least 1.

    Raises:
        UserError: Its logits are not made from the head's weights, or by another map than that of `Tail`.
    """
    if model.get_output_embeddings() is None:
        raise _unlike("it names no output head")
    training = model.training
    model.eval()
    try:
        hidden, product, logits = _forward(model, ids)
        tail = _fit(model, ids, product)
    finally:
        model.train(training)
    module = model.get_output_embeddings()
    tokens = torch.arange(0, product.shape[-1], max(1, product.shape[-1] // _SAMPLE), device=product.device)
    bias = getattr(module, "bias", None)
    if module.weight.shape != (product.shape[-1], hidden.shape[-1]):
        raise _unlike(
            f"its head has weights of {tuple(module.weight.shape)}, for {product.shape[-1]} tokens and a width of "
            f"{hidden.shape[-1]}"
        )
    weight = module.weight[tokens]
    made = F.linear(hidden.to(weight.dtype), weight, None if bias is None else bias[tokens]).float()
    limit = _ROUNDING.get(weight.dtype, 2e-2)
    for what, actual, wanted in (
        ("its head's products are not those of its weights", product[..., tokens].float(), made),
        ("its logits are not made from its head alone", logits[..., tokens].float(), _formula(made, tail)),
    ):
        if not (actual - wanted).abs().max() <= limit * wanted.abs().max():
            raise _unlike(
                f"{what}: {float(actual.flatten()[0]):.4g} where {float(wanted.flatten()[0]):.4g} is expected"
            )
    return tail


def _forward(model: Any, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (1, T, D) that the head gets, its products (1, T, V), and the model's logits (1, T, V)."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, args, made: seen.append((args[0], made)))
    try:
        logits = _logits(model, ids)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise _unlike(f"it calls its head {len(seen)} times to make them")
    hidden, product = seen[0]
    if not isinstance(product, Tensor) or product.shape != logits.shape or product.shape[:2] != (1, len(ids)):
        raise _unlike("its head does not make one logit for each token at each position")
    return hidden, product, logits


def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    row = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    logits: Tensor = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
    return logits


def _fit(model: Any, ids: Sequence[int], product: Tensor) -> Tail:
    """The scale and bound by which the model turns chosen products into logits."""
    precise = torch.float32 if product.device.type == "mps" else torch.float64
    probes = torch.tensor(_PROBES, dtype=precise, device=product.device)
    # Every token gets another one at every position.
    where = torch.arange(product.shape[1], device=product.device)[:, None] + torch.arange(
        product.shape[2], device=product.device
    )
    given = probes[where % len(probes)][None]
    with replaced_head(model, lambda _: given.clone()):
        logits = _logits(model, ids)
    near, far = (logits[given == size] for size in (_SLOPE, _FAR))
    if not near.numel() or not far.numel() or not (near[0] > 0 and far[0] > 0):
        raise _unlike("they do not rise with its head's products")
    digits = _DIGITS.get(logits.dtype, 3)
    scale, bound = (float(f"{float(value):.{digits}g}") for value in (near[0] / _SLOPE, far[0]))
    tail = Tail(scale, bound if bound < scale * _FAR / 2 else None)
    wanted = _formula(given, tail)
    # Relative to each, as the largest is far beyond the others; the smallest numbers are not told from 0.
    limit = _ROUNDING.get(logits.dtype, 2e-2) * wanted.abs().clamp(min=tail.scale * _SLOPE)
    if not bool(((logits - wanted).abs() <= limit).all()):
        worst = int(((logits - wanted).abs() / limit).nan_to_num(torch.inf).argmax())
        raise _unlike(
            f"a product of {float(given.flatten()[worst]):g} becomes {float(logits.flatten()[worst]):.4g}, which is "
            "neither a scaled nor a softly capped one"
        )
    return tail


def _formula(product: Tensor, tail: Tail) -> Tensor:
    scaled = product * tail.scale
    return scaled if tail.softcap is None else tail.softcap * torch.tanh(scaled / tail.softcap)


def _unlike(how: str) -> UserError:
    return UserError(
        f"the model's logits cannot be made from its output head, which the losses read directly ({how}): choose a "
        "model whose logits are its head's products, scaled or softly capped"
    )
