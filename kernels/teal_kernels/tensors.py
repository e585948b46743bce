"""What a step is bound to: a model's tensors and a few numbers, the same for every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from teal_kernels.quantized import QuantizedMatrix, QuantizedRows

# A layer's matrices, with the column of [layers, PROJECTIONS] thresholds and counts at which the
# projections that stand side by side in each of them begin: q k v o gate up down.
MATRICES = {"qkv": 0, "o": 3, "gate_up": 4, "down": 6}
PROJECTIONS = 7


@dataclass(frozen=True)
class RecoveryVectors:
    """What sparse decoding adds to a model to win back what skipped channels would have given.

    All float32. Dense steps and prompts use the model's own norms, and no biases but its own.
    """

    # Added to the projections' outputs, beside the model's own biases; H hidden, I intermediate.
    qkv: Tensor  # [layers, (Hq + 2 * Hkv) * D]
    o: Tensor  # [layers, H]
    gate_up: Tensor  # [layers, 2 * I]
    down: Tensor  # [layers, H]
    # Weights in the place of the model's own.
    input_layernorm: Tensor  # [layers, H]
    post_attention_layernorm: Tensor  # [layers, H]
    norm: Tensor  # [H]


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
class StepTensors:
    """Weights and a cache on one device, which a step reads (and of the cache, writes) in place.

    All but the integers are of one dtype; a matrix is stored in the same way in every layer.
    """

    layers: Sequence[LayerTensors]
    embed_tokens: Tensor  # [V, H]
    norm: Tensor  # [H]
    lm_head: Tensor | QuantizedRows  # [V, H]
    keys: Tensor  # [layers, Hkv, length, D]
    values: Tensor  # the same shape
    cos: Tensor  # [at least length, R / 2] float32, for the R channels that rope rotates
    sin: Tensor  # the same shape
    query_scales: Tensor  # [at least length] float32, of the scores by the query's position
    num_attention_heads: int  # Hq
    rms_norm_eps: float  # of every norm
    sliding_windows: Sequence[int | None]  # one a layer, None where a layer sees everything
    rotary_dims: Sequence[int]  # R or 0 for each layer: the first channels of a head, or none
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and MLP add
    logits_multiplier: float = 1.0

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embed_tokens.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.embed_tokens.shape[1]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.layers[0].down.shape[0]

    @property
    def num_key_value_heads(self) -> int:
        """Hkv."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self.keys.shape[2]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.keys.shape[3]

    def vectors(self, recovery: RecoveryVectors | None = None) -> RecoveryVectors:
        """Biases of all projections and weights of all norms, float32, as a step uses them.

        Args:
            recovery: its biases are added to the model's own, its norms take the place of theirs;
                None is the model's own alone, zeros where it has no bias.
        """
        device = self.embed_tokens.device

        def biases(name: str) -> Tensor:
            own = (getattr(layer, f"{name}_bias", None) for layer in self.layers)
            none = torch.zeros(sum(self.widths(name)), device=device)
            rows = torch.stack([none if bias is None else bias.float() for bias in own])
            return rows if recovery is None else rows + getattr(recovery, name).to(rows)

        def norms(name: str) -> Tensor:
            own = torch.stack([getattr(layer, name).float() for layer in self.layers])
            return own if recovery is None else getattr(recovery, name).to(own).contiguous()

        norm = self.norm if recovery is None else recovery.norm
        return RecoveryVectors(
            **{name: biases(name) for name in MATRICES},
            input_layernorm=norms("input_layernorm"),
            post_attention_layernorm=norms("post_attention_layernorm"),
            norm=norm.to(device, torch.float32).contiguous(),
        )

    def widths(self, name: str) -> tuple[int, ...]:
        """Columns of the projections that stand side by side in a matrix."""
        kv = self.num_key_value_heads * self.head_dim
        return {
            "qkv": (self.num_attention_heads * self.head_dim, kv, kv),
            "o": (self.hidden_size,),
            "gate_up": (self.intermediate_size, self.intermediate_size),
            "down": (self.hidden_size,),
        }[name]


def bits_of(weight: Tensor | QuantizedMatrix | QuantizedRows) -> int:
    """Bits of a weight, without its share of scales."""
    return 8 * weight.element_size() if isinstance(weight, Tensor) else weight.bits
