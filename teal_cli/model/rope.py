"""Rotary position embedding (Su et al., arXiv 2104.09864) and its stretched forms.

The frequencies are computed in float32 as the models were trained, not in float64: at position
8000 the two differ by more than the rounding of the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teal_cli.model.rope_config import RopeConfig, yarn_scale


class RotaryEmbedding:
    """Rotates queries and keys by their position; the tables grow with the longest position."""

    def __init__(self, config: RopeConfig, rotary_dim: int, device: torch.device) -> None:
        self.inv_freq = inverse_frequencies(config, rotary_dim).to(device)
        self.scaling = attention_scaling(config)
        self._beta = config.llama_4_scaling_beta
        self._original = config.original_max_position_embeddings
        self._cos = self._sin = torch.empty(0, rotary_dim // 2, device=device)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to length - 1, each [length, rotary_dim / 2] float32."""
        if length > self._cos.shape[0]:
            rows = 1 << (length - 1).bit_length()
            positions = torch.arange(rows, dtype=torch.float32, device=self.inv_freq.device)
            angles = positions[:, None] * self.inv_freq
            self._cos = angles.cos() * self.scaling
            self._sin = angles.sin() * self.scaling
        return self._cos[:length], self._sin[:length]

    def query_growth(self, position: int | Tensor, rows: int) -> Tensor | None:
        """Factors [rows] float32 on the queries from `position` on; None where all are 1.

        Llama 4's temperature of long texts, as Ministral 3 has it.
        """
        if self._beta is None or self._original is None:
            return None
        positions = torch.arange(rows, device=self.inv_freq.device) + position
        return 1 + self._beta * (1 + (positions / self._original).floor()).log()

    def rotate(self, x: Tensor, position: int | Tensor) -> Tensor:
        """Rotate x [T, heads, head_dim], whose first row stands at `position`.

        A position on the device [1] is one that the tables have; channels beyond rotary_dim stay.
        """
        if isinstance(position, Tensor):
            cos, sin = self._cos[position, None], self._sin[position, None]
        else:
            cos, sin = self.tables(position + x.shape[0])
            cos, sin = cos[position:, None], sin[position:, None]
        width = cos.shape[-1]
        first, second, rest = x.split((width, width, x.shape[-1] - 2 * width), dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        rotated = rotated.to(x.dtype)
        return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair of channels, [head_dim / 2] float32, as transformers'."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = config.theta**exponents  # over 2 pi
    if config.type == "linear":
        return 1.0 / wavelengths / config.factor
    if config.type == "llama3":
        return _llama3(config, 1.0 / wavelengths)
    if config.type == "yarn":
        return _yarn(config, wavelengths, head_dim)
    if config.type == "longrope":
        return 1.0 / (torch.tensor(config.divisors) * wavelengths)
    return 1.0 / wavelengths


def attention_scaling(config: RopeConfig) -> float:
    """Factor on cosines and sines."""
    if config.attention_factor is not None:
        return config.attention_factor
    return yarn_scale(config.factor) if config.type == "yarn" else 1.0


def _llama3(config: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: divide low frequencies by the factor, keep high ones, blend in between."""
    assert config.original_max_position_embeddings is not None
    turns = config.original_max_position_embeddings / (2 * math.pi / inv_freq)
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / config.factor + blend * inv_freq


def _yarn(config: RopeConfig, wavelengths: Tensor, head_dim: int) -> Tensor:
    """YaRN's "NTK-by-parts" (arXiv 2309.00071, section 3.2)."""
    original = config.original_max_position_embeddings
    assert original is not None

    def channel(turns: float) -> float:
        """The pair of channels that turns this often within the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = channel(config.beta_fast), channel(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    steps = torch.arange(head_dim // 2, dtype=torch.float32)
    kept = 1 - ((steps - low) / ((high - low) or 0.001)).clamp(0.0, 1.0)
    return 1.0 / (config.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
