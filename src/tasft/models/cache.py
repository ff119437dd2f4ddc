"""The cache of a batch, with room for tokens to come."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # Tokens for which room is made at a time.


class RoomyLayer(DynamicLayer):
    """What `DynamicLayer` holds, as the beginning of longer tensors: a step writes its own tokens, and copies none.

    What is taken off the end is written over: keys that somebody kept from before `crop` change.
    """

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As `DynamicLayer.update`; both are (B, heads, T, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _with(self.keys, key_states)
        self.values = _with(self.values, value_states)
        return self.keys, self.values


def _with(held: Tensor, new: Tensor) -> Tensor:
    """What is held and the new behind it, in the same place if there is room."""
    begin, width = held.shape[-2] if held.numel() else 0, new.shape[-1]
    end = begin + new.shape[-2]
    # Heads lie as far apart as there is room; those that were copied to take rows out lie close together.
    room = held.stride(-3) // width if begin and held.stride(-2) == width else 0
    if room < end:
        longer = new.new_empty(*new.shape[:-2], end + ROOM, width)
        if begin:
            longer[..., :begin, :] = held
    else:
        longer = held.as_strided((*held.shape[:-2], room, width), held.stride(), held.storage_offset())
    longer[..., begin:end, :] = new
    return longer[..., :end, :]


def make_room(cache: Any) -> None:
    """Give the empty layers of a cache that grow with every token room for more; the others stay as they are."""
    if type(cache) is DynamicCache:
        cache.layers = [
            RoomyLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer
            for layer in cache.layers
        ]
