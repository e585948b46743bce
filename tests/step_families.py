"""Tiny configs of every family, for tests of the GPU's steps."""

from __future__ import annotations

from typing import Any

BASE = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
}
# Widths off every block, one head group of three, biases, q/k norm, a window.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2-odd": {
        "model_type": "qwen2",
        "hidden_size": 60,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 20,
        "intermediate_size": 97,
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "attention_bias": True, "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": 7, "head_dim": 16},
    "phi3": {"model_type": "phi3", "head_dim": 20, "partial_rotary_factor": 0.6},
    "granite": {
        "model_type": "granite",
        "attention_bias": True,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 4.0,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "ministral3": {
        "model_type": "ministral3",
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.4,
        },
    },
}
