"""Random weights at any architecture's real shape, for measuring speed without a download."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.huge_pages import placing
from teal_cli.model.quantization import Quantization, Quantized
from teal_cli.model.weights import build_weights, tensor_shapes


def random_decoder(
    config: ModelConfig,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int,
    kind: Quantization | None = None,
) -> Decoder:
    """A decoder whose weights are normal with deviation 1/sqrt(inputs) and whose norms are near 1.

    Activations then keep their size from layer to layer, and no tensor holds runs of zeros that
    a memory system or a kernel could profit from. What `kind` quantizes is rounded as soon as it
    is made.

    Raises:
        UnsupportedError: the shape cannot be quantized like that.
    """
    if kind is not None:
        kind.check(config)
    shapes = tensor_shapes(config, kind)
    generator = torch.Generator(device).manual_seed(seed)

    place = placing(device, 0)

    def tensor(name: str) -> Tensor | Quantized:
        made = floats(name)
        if kind is None or not kind.quantizes(name):
            return place(made)
        rounded = kind.round(name, made)
        return replace(rounded, rows=place(rounded.rows))

    def floats(name: str) -> Tensor:
        shape = shapes[name]
        out = torch.empty(shape, dtype=dtype, device=device)
        if len(shape) == 2:
            inputs = config.hidden_size if name in ("embed_tokens", "lm_head") else shape[0]
            return out.normal_(std=inputs**-0.5, generator=generator)
        return out.normal_(mean=float("norm" in name), std=0.1, generator=generator)

    return Decoder(config, build_weights(config, tensor, kind))


def _shape(
    model_type: str,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    vocab_size: int,
    max_position_embeddings: int,
    **more: Any,
) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": model_type,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "vocab_size": vocab_size,
            "max_position_embeddings": max_position_embeddings,
            "rms_norm_eps": 1e-5,
            **more,
        }
    )


_LLAMA_3 = {"rope_theta": 500000.0}
_LLAMA_3_1 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_LLAMA_3_2 = {
    "rope_theta": 500000.0,
    "rope_scaling": {**_LLAMA_3_1["rope_scaling"], "factor": 32.0},  # type: ignore[dict-item]
    "tie_word_embeddings": True,
}
_QWEN = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
_QWEN_TIED = {**_QWEN, "tie_word_embeddings": True}
_SMALL_3 = {"head_dim": 128, "rope_theta": 1e9, "sliding_window": None}
# Of its longrope, the part up to the original context.
_PHI_4_MINI = {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}
_GRANITE = {
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
}
_GRANITE_2B = {**_GRANITE, "attention_multiplier": 0.015625, "logits_scaling": 8.0}
_GRANITE_8B = {**_GRANITE, "attention_multiplier": 0.0078125, "logits_scaling": 16.0}
_SMOLLM2 = {"rope_theta": 100000.0, "tie_word_embeddings": True}

# Columns: family, hidden, intermediate, layers, heads, key-value heads, vocabulary, positions.
SHAPES: dict[str, ModelConfig] = {
    "llama-2-7b": _shape("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-2-13b": _shape("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
    "llama-2-70b": _shape("llama", 8192, 28672, 80, 64, 8, 32000, 4096),
    "llama-3-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128256, 8192, **_LLAMA_3),
    "llama-3-70b": _shape("llama", 8192, 28672, 80, 64, 8, 128256, 8192, **_LLAMA_3),
    "llama-3.1-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128256, 131072, **_LLAMA_3_1),
    "llama-3.2-1b": _shape(
        "llama", 2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, **_LLAMA_3_2
    ),
    "llama-3.2-3b": _shape(
        "llama", 3072, 8192, 28, 24, 8, 128256, 131072, head_dim=128, **_LLAMA_3_2
    ),
    "mistral-7b": _shape("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=4096),
    "mistral-small-24b": _shape("mistral", 5120, 32768, 40, 32, 8, 131072, 131072, **_SMALL_3),
    "ministral-3-8b": _shape("ministral3", 4096, 14336, 34, 32, 8, 131072, 262144),
    "phi-3-mini": _shape("phi3", 3072, 8192, 32, 32, 32, 32064, 4096, sliding_window=2047),
    "phi-4-mini": _shape("phi3", 3072, 8192, 32, 24, 8, 200064, 4096, **_PHI_4_MINI),
    "granite-3.3-2b": _shape("granite", 2048, 8192, 40, 32, 8, 49159, 131072, **_GRANITE_2B),
    "granite-3.3-8b": _shape("granite", 4096, 12800, 40, 32, 8, 49159, 131072, **_GRANITE_8B),
    "smollm3-3b": _shape("smollm3", 2048, 11008, 36, 16, 4, 128256, 65536, rope_theta=5e6),
    "tinyllama-1.1b": _shape("llama", 2048, 5632, 22, 32, 4, 32000, 2048),
    "qwen2.5-0.5b": _shape("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, **_QWEN_TIED),
    "qwen2.5-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, **_QWEN),
    "qwen3-0.6b": _shape("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, **_QWEN_TIED),
    "qwen3-8b": _shape("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, **_QWEN),
    "smollm2-135m": _shape("llama", 576, 1536, 30, 9, 3, 49152, 8192, **_SMOLLM2),
    "smollm2-360m": _shape("llama", 960, 2560, 32, 15, 5, 49152, 8192, **_SMOLLM2),
    "smollm2-1.7b": _shape(
        "llama", 2048, 8192, 24, 32, 32, 49152, 8192, rope_theta=130000.0, tie_word_embeddings=True
    ),
}
