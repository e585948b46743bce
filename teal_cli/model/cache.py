"""The key-value cache: allocated once, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.model.config import ModelConfig


class KVCache:
    """Keys (after rotary embedding) and values of one sequence, for every layer.

    `keys` and `values` are [num_hidden_layers, num_key_value_heads, length, head_dim].
    """

    def __init__(
        self, config: ModelConfig, length: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate room for `length` positions.

        Raises:
            UsageError: `length` is below 1 or beyond the model's context_length.
        """
        if not 1 <= length <= config.context_length:
            raise UsageError(
                f"a context of {length} tokens is out of range: this model's is "
                f"1 to {config.context_length}"
            )
        shape = (config.num_hidden_layers, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def length(self) -> int:
        """Positions that there is room for."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def write(
        self, layer: int, position: int | Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store T positions of a layer and return all that the layer has up to them.

        Args:
            layer: index of the layer.
            position: absolute position of the first row. On the device, [1] int64, it is a single
                row's, and the whole cache comes back: shapes then never change.
            keys: [num_key_value_heads, T, head_dim].
            values: the same shape.

        Returns:
            Keys and values, [num_key_value_heads, position + T, head_dim], in the cache's dtype.

        Raises:
            UsageError: the context is full.
        """
        if isinstance(position, Tensor):
            self.keys[layer].index_copy_(1, position, keys)
            self.values[layer].index_copy_(1, position, values)
            return self.keys[layer], self.values[layer]
        end = position + keys.shape[1]
        if end > self.length:
            raise UsageError(f"the context is full: it holds {self.length} tokens")
        self.keys[layer, :, position:end] = keys
        self.values[layer, :, position:end] = values
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def read(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of positions [start, end), of every layer."""
        return self.keys[:, :, start:end].clone(), self.values[:, :, start:end].clone()

    def write_back(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Store what `read` gave, from the position `start` on."""
        end = start + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
