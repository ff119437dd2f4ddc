"""The cache of a batch, with room for tokens to come."""

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # Tokens for which room is made at a time.


class RoomyLayer(DynamicLayer):
    """What `DynamicLayer` holds, in longer tensors: a step writes its own tokens, and copies none before them."""

    keys: Tensor
    values: Tensor
    _keys: Tensor | None = None
    _values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As `DynamicLayer.update`; both are (B, heads, T, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._keys = _longer(self.keys, self._keys, key_states)
        self.values, self._values = _longer(self.values, self._values, value_states)
        return self.keys, self.values


def _longer(held: Tensor, room: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
    """What is held with the new behind it, and the longer tensor that it is the beginning of."""
    begin = held.shape[-2] if held.numel() else 0
    end = begin + new.shape[-2]
    # Rows that were taken out or repeated left it.
    if room is None or room.data_ptr() != held.data_ptr() or room.shape[-2] < end:
        room = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
        if begin:
            room[..., :begin, :] = held
    room[..., begin:end, :] = new
    return room[..., :end, :], room


def make_room(cache: Any) -> None:
    """Give the layers of a cache that grow with every token room for more of them; the others stay as they are."""
    if type(cache) is DynamicCache:
        assert isinstance(cache, Cache)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
