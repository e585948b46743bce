"""What one token costs in bytes read, and what a run needs in memory: known before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from teal_cli.errors import TealError
from teal_cli.model.config import ModelConfig
from teal_cli.model.quantization import Quantization
from teal_cli.model.weights import has_head, tensor_shapes

_LESS_MEMORY = "Choose a smaller model, a 16-bit --dtype, or a machine with more memory."


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
    config: ModelConfig,
    *,
    itemsize: int,
    kind: Quantization | None = None,
    sparsity: float = 0.0,
    position: int = 0,
) -> TokenBytes:
    """Bytes read for one token.

    Args:
        config: the model's.
        itemsize: bytes of a weight that is a float, and of a cached key or value.
        kind: how the matrices are quantized.
        sparsity: share of the projections' weights that is skipped.
        position: positions in the cache before this token.
    """
    layer = sum(
        matrix_bytes(*shape, itemsize=itemsize, kind=kind, sparsity=sparsity)
        for shape in config.matrix_shapes.values()
    )
    vectors = sum(math.prod(shape) for shape in tensor_shapes(config).values() if len(shape) == 1)
    attended = sum(min(position + 1, window or position + 1) for window in config.sliding_windows)
    return TokenBytes(
        projections=layer * config.num_hidden_layers,
        lm_head=head_bytes(config, itemsize, kind),
        cache=2 * config.kv_size * attended * itemsize,
        other=(vectors + config.hidden_size) * itemsize,
    )


def matrix_bytes(
    inputs: int, outputs: int, *, itemsize: int, kind: Quantization | None, sparsity: float = 0.0
) -> int:
    """Bytes of a layer's matrix, but for the share of its rows that is skipped."""
    row = kind.row_bytes(outputs) if kind else outputs * itemsize
    scales = kind.scale_bytes(outputs) if kind else 0
    return round(inputs * row * (1 - sparsity)) + scales


def head_bytes(config: ModelConfig, itemsize: int, kind: Quantization | None) -> int:
    """Bytes of the lm_head."""
    if kind is not None and kind.head:
        return config.vocab_size * (config.hidden_size + 4)  # a float32 scale a row
    return config.vocab_size * config.hidden_size * itemsize


def weight_bytes(config: ModelConfig, itemsize: int, kind: Quantization | None = None) -> int:
    """Bytes of all of a model's tensors."""
    cost = token_bytes(config, itemsize=itemsize, kind=kind)
    embed_tokens = config.vocab_size * config.hidden_size * itemsize
    head = cost.lm_head if has_head(config, kind) else 0
    own = config.hidden_size * itemsize  # of the token's embedding, a part of embed_tokens
    return cost.projections + cost.other - own + embed_tokens + head


def cache_bytes(config: ModelConfig, itemsize: int, length: int) -> int:
    """Bytes of the keys and values of `length` positions."""
    return 2 * config.num_hidden_layers * config.kv_size * length * itemsize


def require_memory(
    needed: int, available: int | None, what: str, *, hint: str = _LESS_MEMORY
) -> None:
    """Make sure that something fits before it is begun; `hint` says what takes less.

    Raises:
        TealError: `what` needs more bytes than are available.
    """
    if available is not None and needed > available:
        raise TealError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free",
            hint=hint,
        )
