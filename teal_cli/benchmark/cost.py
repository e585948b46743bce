"""What one token costs in bytes read, and what a run needs in memory: known before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from teal_cli.errors import TealError
from teal_cli.model.config import ModelConfig
from teal_cli.model.weights import tensor_shapes


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """Bytes that decoding one token has to read."""

    projections: int
    lm_head: int
    cache: int  # keys and values of the positions that the token attends to
    other: int  # norms, biases and the token's own embedding

    @property
    def total(self) -> int:
        return self.projections + self.lm_head + self.cache + self.other


def token_bytes(
    config: ModelConfig, *, itemsize: int, sparsity: float = 0.0, position: int = 0
) -> TokenBytes:
    """Bytes read for one token.

    Args:
        config: the model's.
        itemsize: bytes of a weight, and of a cached key or value.
        sparsity: share of the projections' weights that is skipped.
        position: positions in the cache before this token.
    """
    weights = sum(i * o for i, o in config.projection_shapes.values()) * config.num_hidden_layers
    vectors = sum(math.prod(shape) for shape in tensor_shapes(config).values() if len(shape) == 1)
    attended = sum(min(position + 1, window or position + 1) for window in config.sliding_windows)
    return TokenBytes(
        projections=round(weights * itemsize * (1 - sparsity)),
        lm_head=config.vocab_size * config.hidden_size * itemsize,
        cache=2 * config.kv_size * attended * itemsize,
        other=(vectors + config.hidden_size) * itemsize,
    )


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of all of a model's tensors."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values()) * itemsize


def cache_bytes(config: ModelConfig, itemsize: int, length: int) -> int:
    """Bytes of the keys and values of `length` positions."""
    return 2 * config.num_hidden_layers * config.kv_size * length * itemsize


def require_memory(needed: int, available: int | None, what: str) -> None:
    """Make sure that something fits before it is begun.

    Raises:
        TealError: `what` needs more bytes than are available.
    """
    if available is not None and needed > available:
        raise TealError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free",
            hint="Choose a smaller model, a 16-bit --dtype, or a machine with more memory.",
        )
