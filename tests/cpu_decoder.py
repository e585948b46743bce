"""A small random decoder for tests of the CPU's decoding step, and its float64 specification."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from teal_kernels.quantized import QuantizedMatrix, QuantizedRows
from teal_kernels.tensors import RecoveryVectors, StepTensors
from torch import Tensor


@dataclass
class Layer:
    input_layernorm: Tensor
    qkv: Tensor | QuantizedMatrix
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor | QuantizedMatrix
    o_bias: Tensor | None
    post_attention_layernorm: Tensor
    gate_up: Tensor | QuantizedMatrix
    down: Tensor | QuantizedMatrix


@dataclass
class Small:
    """Sizes off every vector width, unless told otherwise, and random weights for them."""

    dtype: torch.dtype = torch.float32
    hidden: int = 44
    inner: int = 75
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 10
    vocab: int = 53
    length: int = 12
    bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = (None, None)
    eps: float = 1e-5
    rotary: tuple[int, ...] | None = None  # channels that are rotated, one a layer; None is all
    growth: float = 0.0  # of the scores' scale, from one position to the next
    multipliers: tuple[float, float, float] = (1.0, 1.0, 1.0)  # embedding, residual, logits
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self.embed_tokens = self.random(self.vocab, self.hidden)
        self.norm = 1 + self.random(self.hidden)
        self.lm_head: Tensor | QuantizedRows = self.random(self.vocab, self.hidden)
        self.layers = [self._layer() for _ in self.windows]
        shape = (len(self.windows), self.kv_heads, self.length, self.head_dim)
        self.keys = torch.full(shape, torch.nan, dtype=self.dtype)
        self.values = torch.full(shape, torch.nan, dtype=self.dtype)
        self.rotary = self.rotary or (self.head_dim,) * len(self.windows)
        angles = torch.arange(self.length)[:, None] / 10.0 ** torch.arange(max(self.rotary) // 2)
        growth = 1 + self.growth * torch.arange(self.length)
        self.query_scales = self.head_dim**-0.5 * growth
        self.cos, self.sin = 1.25 * angles.cos(), 1.25 * angles.sin()

    def random(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self.generator) / shape[0] ** 0.5).to(self.dtype)

    def quantize(self, groups: dict[str, int], *, lm_head: bool = False) -> None:
        """Round matrices to int8 (group 0) or int4, by their names, and the lm_head to int8."""
        for layer in self.layers:
            for name, group in groups.items():
                weight = getattr(layer, name)
                matrix = (
                    QuantizedMatrix.int4(weight, group) if group else QuantizedMatrix.int8(weight)
                )
                setattr(layer, name, matrix)
        if lm_head:
            assert isinstance(self.lm_head, Tensor)
            self.lm_head = QuantizedRows.int8(self.lm_head)

    def _layer(self) -> Layer:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return Layer(
            input_layernorm=1 + self.random(self.hidden),
            qkv=self.random(self.hidden, q + 2 * kv),
            qkv_bias=self.random(q + 2 * kv) if self.bias else None,
            q_norm=1 + self.random(self.head_dim) if self.qk_norm else None,
            k_norm=1 + self.random(self.head_dim) if self.qk_norm else None,
            o=self.random(q, self.hidden),
            o_bias=self.random(self.hidden) if self.bias else None,
            post_attention_layernorm=1 + self.random(self.hidden),
            gate_up=self.random(self.hidden, 2 * self.inner),
            down=self.random(self.inner, self.hidden),
        )

    def vectors(self) -> RecoveryVectors:
        """Random ones of this decoder's sizes, as large as what they are added to."""
        layers, kv = len(self.layers), self.kv_heads * self.head_dim
        widths = {"qkv": self.heads * self.head_dim + 2 * kv, "o": self.hidden}
        widths |= {"gate_up": 2 * self.inner, "down": self.hidden}

        def norms(*shape: int) -> Tensor:
            return 1 + torch.randn(shape, generator=self.generator) / 2

        return RecoveryVectors(
            **{
                name: torch.randn(layers, width, generator=self.generator)
                for name, width in widths.items()
            },
            input_layernorm=norms(layers, self.hidden),
            post_attention_layernorm=norms(layers, self.hidden),
            norm=norms(self.hidden),
        )

    def step(self, **options: Any) -> Any:
        from teal_kernels.cpu import DecodeStep

        return DecodeStep(self.tensors(), **options)

    def prefill(self, **options: Any) -> Any:
        from teal_kernels.cpu import Prefill

        return Prefill(self.tensors(), **options)

    def tensors(self, device: str = "cpu") -> StepTensors:
        """What a step is bound to; copies of it on another device."""

        def layer(own: Layer) -> Layer:
            moved = {name: None if x is None else x.to(device) for name, x in vars(own).items()}
            return Layer(**moved)

        assert self.rotary is not None
        return StepTensors(
            layers=[layer(own) for own in self.layers],
            embed_tokens=self.embed_tokens.to(device),
            norm=self.norm.to(device),
            lm_head=self.lm_head.to(device),
            keys=self.keys.to(device),
            values=self.values.to(device),
            cos=self.cos.to(device),
            sin=self.sin.to(device),
            query_scales=self.query_scales.to(device),
            num_attention_heads=self.heads,
            rms_norm_eps=self.eps,
            sliding_windows=self.windows,
            rotary_dims=self.rotary,
            embedding_multiplier=self.multipliers[0],
            residual_multiplier=self.multipliers[1],
            logits_multiplier=self.multipliers[2],
        )


class Oracle:
    """Decodes in float64, with keys and values rounded to the cache's dtype.

    After each step it takes over the cache of the step under test, having compared it: a key that
    is rounded the other way is no error, but would grow into one.
    """

    def __init__(self, small: Small, error: float = 4e-6) -> None:
        """`error` is what a cached value may be off, besides its rounding."""
        self.small = small
        self.error = error
        self.thresholds = torch.full((len(small.layers), 7), -torch.inf)
        self.kept = torch.zeros(len(small.layers), 7, dtype=torch.int64)
        self.vectors: RecoveryVectors | None = None

    def __call__(self, token: int, position: int) -> Tensor:
        """Logits; to be called after the step under test, whose cache it checks and reads."""
        small = self.small
        embedding, residual, logits = small.multipliers
        hidden = small.embed_tokens[token].double() * embedding
        for index, layer in enumerate(small.layers):
            hidden = hidden + residual * self._attention(index, layer, hidden, position)
            x = self._norm(hidden, self._weight("post_attention_layernorm", index))
            gate, up = self._project(index, (4, 5), x, layer.gate_up, small.inner, small.inner)
            act = gate / (1 + (-gate).exp()) * up
            added = self._project(index, (6,), act, layer.down, small.hidden)[0]
            hidden = hidden + residual * added
        norm = small.norm if self.vectors is None else self.vectors.norm
        return _wide(small.lm_head) @ self._norm(hidden, norm) * logits

    def _attention(self, index: int, layer: Layer, hidden: Tensor, position: int) -> Tensor:
        small, d = self.small, self.small.head_dim
        q_size, kv_size = small.heads * d, small.kv_heads * d
        x = self._norm(hidden, self._weight("input_layernorm", index))
        parts = self._project(index, (0, 1, 2), x, layer.qkv, q_size, kv_size, kv_size)
        if layer.qkv_bias is not None:
            biases = layer.qkv_bias.double().split((q_size, kv_size, kv_size))
            parts = [part + bias for part, bias in zip(parts, biases, strict=True)]
        q, k, v = (part.reshape(-1, d) for part in parts)
        if layer.q_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        q, k = self._rotate(q, index, position), self._rotate(k, index, position)
        self._compare(small.keys[index, :, position], k)
        self._compare(small.values[index, :, position], v)
        window = small.windows[index]
        first = 0 if window is None else max(0, position + 1 - window)
        out = []
        for head in range(small.heads):
            group = head * small.kv_heads // small.heads
            keys = small.keys[index, group, first : position + 1].double()
            scale = float(small.query_scales[position])
            weights = (keys @ q[head] * scale).softmax(0)
            out.append(weights @ small.values[index, group, first : position + 1].double())
        y = self._project(index, (3,), torch.cat(out), layer.o, small.hidden)[0]
        return y if layer.o_bias is None else y + layer.o_bias.double()

    def _project(
        self,
        index: int,
        names: tuple[int, ...],
        x: Tensor,
        weight: Tensor | QuantizedMatrix,
        *sizes: int,
    ) -> list[Tensor]:
        parts = []
        learnt = torch.zeros(sum(sizes))
        if self.vectors is not None:
            matrix = {0: "qkv", 3: "o", 4: "gate_up", 6: "down"}[names[0]]
            learnt = getattr(self.vectors, matrix)[index]
        wide, biases = _wide(weight).split(sizes, dim=1), learnt.double().split(sizes)
        for name, columns, bias in zip(names, wide, biases, strict=True):
            keep = x.abs() > self.thresholds[index, name].double()
            self.kept[index, name] += keep.sum()
            parts.append((x * keep) @ columns + bias)
        return parts

    def _weight(self, name: str, index: int) -> Tensor:
        """The layer's own norm, or the one that was learnt."""
        own: Tensor = getattr(self.small.layers[index], name)
        learnt = None if self.vectors is None else getattr(self.vectors, name)[index]
        return own if learnt is None else learnt

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return x / (x.square().mean(-1, keepdim=True) + self.small.eps).sqrt() * weight.double()

    def _rotate(self, x: Tensor, index: int, position: int) -> Tensor:
        """transformers' convention: channel i turns with channel i + half of those that turn."""
        assert self.small.rotary is not None
        half = self.small.rotary[index] // 2
        cos = self.small.cos[position, :half].double()
        sin = self.small.sin[position, :half].double()
        x, rest = x[:, : 2 * half], x[:, 2 * half :]
        turned = torch.cat((-x[:, half:], x[:, :half]), dim=1)
        rotated = x * torch.cat((cos, cos)) + turned * torch.cat((sin, sin))
        return torch.cat((rotated, rest), dim=1)

    def _compare(self, cached: Tensor, exact: Tensor) -> None:
        error = (cached.double() - exact).abs()
        bound = torch.finfo(cached.dtype).eps / 2 * exact.abs() + self.error
        assert bool((error <= bound).all()), f"cache off by {float(error.max()):.3g}"


def _wide(weight: Tensor | QuantizedMatrix | QuantizedRows) -> Tensor:
    return (weight if isinstance(weight, Tensor) else weight.dequantize()).double()
