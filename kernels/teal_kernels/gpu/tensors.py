"""What a token step asks of a model: its tensors and a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from teal_kernels.quantized import QuantizedMatrix, QuantizedRows

FLOATS = -1  # `Stored.group` of a matrix that is not quantized


class Stored(NamedTuple):
    """A matrix as kernels read it: its elements, and what turns them into weights."""

    elements: Tensor  # floats [K, N], or int32 words [K, N / pack and more]
    grid: Tensor | None  # of int4: scales and offsets of the groups, within the rows
    groups: int  # float16 numbers from a row's scales to its offsets
    scales: Tensor | None  # of integers: [N] float32
    group: int  # columns that share a scale, 0 for int8
    pack: int  # columns in an element

    @classmethod
    def of(cls, weight: Tensor | QuantizedMatrix) -> Stored:
        """A view of the matrix; nothing is copied."""
        if isinstance(weight, Tensor):
            return cls(weight, None, 0, None, FLOATS, 1)
        words = weight.rows.view(torch.int32)
        if not weight.group:
            return cls(words, None, 0, weight.scales, 0, 4)
        grid = weight.rows.view(torch.float16)[:, weight.columns // 4 :]
        return cls(words, grid, weight.groups, weight.scales, weight.group, 8)


def bits_of(weight: Tensor | QuantizedMatrix | QuantizedRows) -> int:
    """Bits of a weight, without its share of scales."""
    return 8 * weight.element_size() if isinstance(weight, Tensor) else weight.bits


class LayerTensors(Protocol):
    """The tensors of a layer, named and laid out as in the decoder's checkpoint."""

    input_layernorm: Tensor  # [H]
    qkv: Tensor | QuantizedMatrix  # [H, (Hq + 2 * Hkv) * D]
    qkv_bias: Tensor | None  # [(Hq + 2 * Hkv) * D]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Tensor | QuantizedMatrix  # [Hq * D, H]
    o_bias: Tensor | None  # [H]
    post_attention_layernorm: Tensor  # [H]
    gate_up: Tensor | QuantizedMatrix  # [H, 2 * I]
    down: Tensor | QuantizedMatrix  # [I, H]


@dataclass(frozen=True)
class Geometry:
    """What the kernels need to know of a model beside its tensors."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    sliding_windows: Sequence[int | None]
