"""The decoder's tensors: names, shapes and the layout that sparse decoding reads.

A projection is stored [in_features, out_features], so that one input channel is one contiguous
row that can be skipped; q/k/v and gate/up lie side by side. The same layout serves dense, sparse
and prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from teal_kernels.quantized import QuantizedMatrix, QuantizedRows
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_cli.model.quantization import Quantization, Quantized
from teal_cli.model.shards import Stored

Matrix = Tensor | QuantizedMatrix  # [in_features, out_features]
Head = Tensor | QuantizedRows  # [V, H]


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer; H hidden size, I intermediate size, D head_dim."""

    input_layernorm: Tensor  # [H]
    qkv: Matrix  # [H, q_size + 2 * kv_size]
    qkv_bias: Tensor | None  # [q_size + 2 * kv_size]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Matrix  # [q_size, H]
    o_bias: Tensor | None  # [H]
    post_attention_layernorm: Tensor  # [H]
    gate_up: Matrix  # [H, 2 * I]
    down: Matrix  # [I, H]


@dataclass(slots=True)
class DecoderWeights:
    """All tensors of a decoder; `lm_head` is `embed_tokens` itself when they are tied."""

    embed_tokens: Tensor  # [V, H]
    layers: list[LayerWeights]
    norm: Tensor  # [H]
    lm_head: Head  # [V, H]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, a tied one counted once."""
        return sum(tensor.nbytes for _, tensor in self.named_tensors())

    @property
    def quantization(self) -> Quantization | None:
        """How the matrices are stored; None is as floats."""
        matrix = self.layers[0].qkv
        if isinstance(matrix, Tensor):
            return None
        return Quantization(matrix.group, head=isinstance(self.lm_head, QuantizedRows))

    def named_tensors(self) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Every tensor under its name in a checkpoint, a tied one once."""
        yield "embed_tokens", self.embed_tokens
        for index, layer in enumerate(self.layers):
            for field in fields(LayerWeights):
                if (tensor := getattr(layer, field.name)) is not None:
                    yield f"layers.{index}.{field.name}", tensor
        yield "norm", self.norm
        if self.lm_head is not self.embed_tokens:
            yield "lm_head", self.lm_head


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that a layer of this model has, in the order of `LayerWeights`."""
    h, d, matrices = config.hidden_size, config.head_dim, config.matrix_shapes
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm": (h,), "qkv": matrices["qkv"]}
    if config.qkv_bias:
        shapes["qkv_bias"] = matrices["qkv"][1:]
    if config.qk_norm:
        shapes |= {"q_norm": (d,), "k_norm": (d,)}
    shapes["o"] = matrices["o"]
    if config.o_bias:
        shapes["o_bias"] = (h,)
    shapes["post_attention_layernorm"] = (h,)
    return shapes | {name: matrices[name] for name in ("gate_up", "down")}


def tensor_shapes(
    config: ModelConfig, kind: Quantization | None = None
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of this model's checkpoint, in the order in which it is stored."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (config.vocab_size, config.hidden_size)}
    for index in range(config.num_hidden_layers):
        for name, shape in layer_shapes(config).items():
            shapes[f"layers.{index}.{name}"] = shape
    shapes["norm"] = (config.hidden_size,)
    if has_head(config, kind):
        shapes["lm_head"] = (config.vocab_size, config.hidden_size)
    return shapes


def stored_tensors(
    config: ModelConfig, dtype: torch.dtype, kind: Quantization | None
) -> dict[str, Stored]:
    """What the files of a checkpoint hold, in their order: a quantized tensor may be two."""
    found: dict[str, Stored] = {}
    for name, shape in tensor_shapes(config, kind).items():
        if kind is not None and kind.quantizes(name):
            found |= kind.stored(name, shape)
        else:
            found[name] = Stored(shape, dtype)
    return found


def load_weights(
    config: ModelConfig, tensors: Mapping[str, Tensor], kind: Quantization | None
) -> DecoderWeights:
    """Assemble a decoder's weights from the tensors of `stored_tensors`."""
    shapes = tensor_shapes(config, kind)

    def tensor(name: str) -> Tensor | Quantized:
        if kind is not None and kind.quantizes(name):
            return kind.load(name, tensors, shapes[name][-1])
        return tensors[name]

    return build_weights(config, tensor, kind)


def build_weights(
    config: ModelConfig, tensor: Callable[[str], Any], kind: Quantization | None = None
) -> DecoderWeights:
    """Assemble a decoder's weights from a function that gives the tensor of each name.

    Of what `kind` quantizes, the function gives a `QuantizedMatrix` or `QuantizedRows`.
    """
    present = layer_shapes(config)

    def layer(index: int) -> LayerWeights:
        names = (field.name for field in fields(LayerWeights))
        tensors: dict[str, Any] = {
            name: tensor(f"layers.{index}.{name}") if name in present else None for name in names
        }
        return LayerWeights(**tensors)

    embed_tokens = tensor("embed_tokens")
    return DecoderWeights(
        embed_tokens=embed_tokens,
        layers=[layer(index) for index in range(config.num_hidden_layers)],
        norm=tensor("norm"),
        lm_head=tensor("lm_head") if has_head(config, kind) else embed_tokens,
    )


def has_head(config: ModelConfig, kind: Quantization | None) -> bool:
    """Whether the lm_head is a matrix of its own: a tied one is, once it is quantized."""
    return not config.tie_word_embeddings or (kind is not None and kind.head)


def multiply(x: Tensor, weight: Matrix, start: int = 0, end: int | None = None) -> Tensor:
    """x [T, K] → its product with columns start to end of weight, in the dtype of x."""
    if isinstance(weight, QuantizedMatrix):
        return weight.multiply(x, start, end)
    return x @ weight[:, start:end].to(x.dtype)


def floats(weight: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    """A whole tensor in a floating-point dtype."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype=dtype)
