"""Keys and values of the tokens read so far, for generation.

Core attention stores them after rotation, so each key is rotated once. (Megatron-Core's inference contexts do not fit:
one stores keys before rotation, the other bypasses core attention and with it our positions.)

    full layer      a buffer for `capacity` tokens, filled from the front
    windowed layer  the last `window - 1` tokens: all that the next query sees besides its own

A token of Llama 3.1 8B takes 2 x 32 layers x 8 heads x 128 channels x 2 bytes = 128 KiB in bf16.
"""

from __future__ import annotations

import torch

from megalong.attention.mask import FULL, BlockMask


class KVCache:
    """The cache of one batch of sequences of equal length.

    Args:
        capacity: maximum number of tokens, prompt and answer together.

    Attributes:
        length: tokens read before the current call of the model; `advance` counts the call's own.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def advance(self, tokens: int) -> None:
        """Count `tokens` more, which every layer has read."""
        self.length += tokens

    def extend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, BlockMask]:
        """Append a layer's new keys and values `[s, b, g, d]` (keys rotated).

        Returns:
            The keys and values that any of the s queries sees, `[m, b, g, d]`, and their mask.
        """
        assert self.length + len(key) <= self.capacity
        keys, values = self._append(layer, key, value) if window is None else self._roll(layer, key, value, window)
        if len(key) == 1:
            return keys, values, FULL
        before = len(keys) - len(key)
        return keys, values, BlockMask(upper=before, lower=None if window is None else before - window + 1)

    def _append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._layers:
            self._layers[layer] = tuple(new.new_empty(self.capacity, *new.shape[1:]) for new in (key, value))  # type: ignore[assignment]
        stop = self.length + len(key)
        for kept, new in zip(self._layers[layer], (key, value), strict=True):
            kept[self.length : stop] = new
        keys, values = self._layers[layer]
        return keys[:stop], values[:stop]

    def _roll(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, window: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer in self._layers:
            old_keys, old_values = self._layers[layer]
            key, value = torch.cat([old_keys, key]), torch.cat([old_values, value])
        first = max(0, len(key) - window + 1)
        # Copies: a view would keep the whole chunk of a prompt in memory.
        self._layers[layer] = key[first:].clone(), value[first:].clone()
        return key, value
