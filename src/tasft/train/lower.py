"""Layers below the first that is trained: two passes over a batch need what they compute only once."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasft.models.head import replaced_forward

_LAYER = re.compile(r"(?P<layers>.*\.layers)\.(?P<number>\d+)\.")


class LowerLayers:
    """The layers of a model below the first with something to train.

    They give the same for a batch with an adapter and without it.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self._serve = None if layers else False
        self._made: Any = None

    def before(self, run: Callable[[], Tensor]) -> Tensor:
        """What a pass returns; what these layers computed in it is kept for the next pass.

        It is tried once whether a pass without them gives the same to the bit: some models hand more from layer to
        layer than hidden states.
        """
        # Layers whose activations are made again in the backward pass would be asked then too.
        if self._serve is False or any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            return run()
        hook = self.layers[-1].register_forward_hook(self._keep)
        try:
            result = run()
        finally:
            hook.remove()
        if self._serve is None:
            self._serve, made = True, self._made
            try:
                with self.skipping():
                    self._serve = torch.equal(run(), result)
            except Exception:  # Whatever an upper layer looks for and does not find.
                self._serve = False
            self._made = made
        return result

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Within, a pass over the same batch takes what was kept, and computes none of these layers."""
        if not self._serve or self._made is None:
            yield
            return
        made = self._made
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(replaced_forward(layer, lambda *_, **__: made))
            yield
        self._made = None

    def _keep(self, _layer: nn.Module, _given: Any, made: Any) -> None:
        self._made = made


def lower_layers(model: PreTrainedModel) -> LowerLayers:
    """The lower layers of a model with an adapter; none where training would compute something else in them."""
    matches = [_LAYER.match(name) for name, weight in model.named_parameters() if weight.requires_grad]
    names = {match and match["layers"] for match in matches}
    if len(names) != 1 or None in names:
        return LowerLayers([])
    first = min(int(match["number"]) for match in matches if match)
    lower = list(model.get_submodule(str(names.pop())))[:first]
    modules = [module for layer in lower for module in layer.modules()]
    drops = [getattr(module, name, 0) for module in modules for name in ("p", "attention_dropout", "dropout")]
    # A frozen adapter there is off in the pass without the adapter, and on in the other.
    adapted = any(isinstance(module, BaseTunerLayer) for module in modules)
    return LowerLayers([] if adapted or any(isinstance(share, float) and share for share in drops) else lower)
