"""What a token step asks of a model: its tensors and a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class LayerTensors(Protocol):
    """The tensors of a layer, named and laid out as in the decoder's checkpoint."""

    input_layernorm: Tensor  # [H]
    qkv: Tensor  # [H, (Hq + 2 * Hkv) * D]
    qkv_bias: Tensor | None  # [(Hq + 2 * Hkv) * D]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Tensor  # [Hq * D, H]
    o_bias: Tensor | None  # [H]
    post_attention_layernorm: Tensor  # [H]
    gate_up: Tensor  # [H, 2 * I]
    down: Tensor  # [I, H]


@dataclass(frozen=True)
class Geometry:
    """What the kernels need to know of a model beside its tensors."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    sliding_windows: Sequence[int | None]
