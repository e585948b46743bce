"""A GGUF file of a decoder's shape with random weights, for programs that read nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teal_cli.errors import UnsupportedError
from teal_cli.model.config import ModelConfig
from teal_cli.model.quantization import Quantization
from teal_cli.store import artifacts

# llama.cpp's name of the architecture; a Mistral is a Llama there.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_BLOCK = 32  # weights of Q8_0 and Q4_0 that share a float16 scale


def kind_of(dtype: torch.dtype, quantization: Quantization | None) -> str:
    """GGUF's type with as many bits a weight as ours."""
    if quantization is None:
        return _FLOATS[dtype]
    return "Q4_0" if quantization.group else "Q8_0"


def write(
    path: Path, config: ModelConfig, dtype: torch.dtype, quantization: Quantization | None
) -> None:
    """Write a model of random weights; its rope is the plain one, which takes as long as any.

    Args:
        path: of the file.
        config: the shape.
        dtype: of our weights that are floats.
        quantization: of our matrices, as which llama.cpp's get as many bits.

    Raises:
        UnsupportedError: llama.cpp's form of this architecture is not known here.
        TealError: the disk is too full.
    """
    import gguf

    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UnsupportedError(f"teal writes no GGUF of this {config.model_type}")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kind, floats = kind_of(dtype, quantization), _FLOATS[dtype]
    head = "Q8_0" if quantization is not None and quantization.head else floats
    tensors = list(_tensors(config, kind, head))
    stored = {name: _stored(shape, kind) for name, shape, kind in tensors}
    for name, (shape, number) in stored.items():
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), number)
    artifacts.check_free_space(path.parent, sum(math.prod(shape) for shape, _ in stored.values()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for shape, number in stored.values():
        writer.write_tensor_data(_bytes(shape, number.name, random))
    writer.close()


def _tensors(
    config: ModelConfig, kind: str, head: str
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of each tensor, [out_features, in_features]."""
    hidden, inner, q, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.q_size,
        config.kv_size,
    )
    yield "token_embd.weight", (config.vocab_size, hidden), head
    for layer in range(config.num_hidden_layers):
        for name, shape in {
            "attn_q": (q, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, q),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }.items():
            yield f"blk.{layer}.{name}.weight", shape, kind
        vectors = {"attn_norm.weight": hidden, "ffn_norm.weight": hidden}
        if config.qkv_bias:
            vectors |= {"attn_q.bias": q, "attn_k.bias": kv, "attn_v.bias": kv}
        if config.qk_norm:
            vectors |= {
                "attn_q_norm.weight": config.head_dim,
                "attn_k_norm.weight": config.head_dim,
            }
        for name, size in vectors.items():
            yield f"blk.{layer}.{name}", (size,), "F32"
    yield "output_norm.weight", (hidden,), "F32"
    if not config.tie_word_embeddings:
        yield "output.weight", (config.vocab_size, hidden), head


def _stored(shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], Any]:
    """The shape of a tensor's bytes, and its type; rows of odd length stay floats."""
    import gguf

    if kind.startswith("Q") and shape[-1] % _BLOCK:
        kind = "F16"
    number = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[number]
    return (*shape[:-1], shape[-1] // weights * size), number


def _bytes(shape: tuple[int, ...], kind: str, random: np.random.Generator) -> Any:
    """Random weights of about 0.02, as bytes [..., row]: some thousand that are repeated."""
    count = 1 << 16
    values = (random.standard_normal(count) * 0.02).astype(np.float32)
    if kind == "BF16":
        some = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    elif kind in ("F16", "F32"):
        some = values.astype(np.float16 if kind == "F16" else np.float32).view(np.uint8)
    else:
        size, largest = (32, 127) if kind == "Q8_0" else (16, 8)
        blocks = np.empty((count // _BLOCK, 2 + size), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(0.04 / largest).tobytes(), dtype=np.uint8)
        blocks[:, 2:] = random.integers(0, 256, (len(blocks), size), dtype=np.uint8)
        some = blocks.reshape(-1)
    return np.resize(some, shape)
