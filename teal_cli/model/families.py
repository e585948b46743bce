"""What each family of models adds to the Llama decoder, and which models are of none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teal_cli.errors import TealError, UnsupportedError

# How many experts a layer has, by family.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Granite's numbers, under names that transformers and `ModelConfig` share.
MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


@dataclass(frozen=True, slots=True)
class Family:
    """What a family adds to the Llama decoder, and what transformers assumes of a short config."""

    assumed: Mapping[str, Any]
    qkv_bias: bool = False
    attention_bias: bool = False  # obeys `attention_bias`: biases on q, k, v and o
    qk_norm: bool = False
    # Layers with a sliding window: "all", or those of `layer_types` if `use_sliding_window`.
    windows: str | None = None
    multipliers: bool = False  # obeys those of MULTIPLIERS
    no_rope_layers: bool = False  # obeys `no_rope_layers`
    fused: bool = False  # q, k and v are one tensor, gate and up another


FAMILIES = {
    "llama": Family({"max_position_embeddings": 2048}, attention_bias=True),
    "mistral": Family(
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
    ),
    "ministral3": Family(
        {
            "max_position_embeddings": 262144,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        windows="all",
    ),
    "qwen2": Family(
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
        qkv_bias=True,
        windows="some",
    ),
    "qwen3": Family(
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
        },
        attention_bias=True,
        qk_norm=True,
        windows="some",
    ),
    "phi3": Family(
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        windows="all",
        fused=True,
    ),
    "granite": Family(
        {"max_position_embeddings": 2048, "attention_multiplier": 1.0},
        attention_bias=True,
        multipliers=True,
    ),
    "smollm3": Family(
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
        },
        attention_bias=True,
        windows="some",
        no_rope_layers=True,
    ),
}
# Models of several parts whose language model is one of these families.
_WRAPPERS = {"mistral3": ("mistral", "ministral3")}
# What of their config.json is said of all parts at once.
_OF_ALL_PARTS = (
    *("dtype", "torch_dtype", "tie_word_embeddings", "transformers_weights"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("quantization_config", "compression_config", "quantization"),
)


def language_model(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model alone, of a model that has a part for images besides.

    Raises:
        UnsupportedError: it is of another family than such models have.
        TealError: there is none.
    """
    wrapper = raw.get("model_type")
    if not isinstance(wrapper, str) or wrapper not in _WRAPPERS:
        return dict(raw)
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise TealError("config.json lacks 'text_config'")
    family = text.get("model_type") or _WRAPPERS[wrapper][0]
    if family not in _WRAPPERS[wrapper]:
        raise UnsupportedError(
            f"the language model of this {wrapper} is {family!r}, which is not supported"
        )
    whole = {name: raw[name] for name in _OF_ALL_PARTS if name in raw}
    # transformers ties such a model's head unless it is told not to.
    return {**text, "tie_word_embeddings": True, **whole, "model_type": family}


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of a language model's config.

    Raises:
        UnsupportedError: it is of none, or has what the decoder does not compute.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"model type {model_type!r} is not supported{_reason(raw)}",
            hint=f"Supported: {', '.join([*FAMILIES, *_WRAPPERS])} (SmolLM2 is a llama).",
        )
    if (act := raw.get("hidden_act", "silu")) != "silu":
        raise UnsupportedError(f"activation {act!r} is not supported; teal knows 'silu'")
    if raw.get("mlp_bias"):
        raise UnsupportedError("biases in the MLP (mlp_bias) are not supported")
    return FAMILIES[model_type]


def _reason(raw: Mapping[str, Any]) -> str:
    """What stands in the way with an unknown model type, where its config says so."""
    if any(raw.get(key) for key in _EXPERTS):
        return ": it is a mixture of experts"
    return ": it needs code of its own, which teal does not run" if raw.get("auto_map") else ""
