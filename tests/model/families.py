"""Tiny random models of each family in transformers, and the same weights in our decoder."""

from __future__ import annotations

from typing import Any

import torch

from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.hf_layout import assemble, parts
from teal_cli.model.weights import build_weights, tensor_shapes

_BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "truncate": False,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_DIVISORS = [1.0, 1.0, 1.3, 2.0, 2.5, 3.5, 4.0, 4.0]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": _DIVISORS,
    "long_factor": _DIVISORS,
    "attention_factor": 1.25,
    "original_max_position_embeddings": 64,
}
_SHORT_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.0, 1.1, 1.3, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 8.0, 20.0],
}
_GROWING_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.4,
}
_MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-bias": {"model_type": "llama", "attention_bias": True},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-head-dim": {"model_type": "llama", "head_dim": 24},
    "llama3-rope": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE},
    "linear-rope": {"model_type": "llama", "rope_parameters": _LINEAR_ROPE},
    "yarn-rope": {"model_type": "llama", "rope_parameters": _YARN_ROPE},
    "divisors-rope": {"model_type": "llama", "rope_parameters": _LONGROPE},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3-bias": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
    "phi3-window": {"model_type": "phi3", "pad_token_id": 0, "sliding_window": 16},
    "phi3-partial": {"model_type": "phi3", "pad_token_id": 0, "partial_rotary_factor": 0.5},
    "phi3-longrope": {
        "model_type": "phi3",
        "pad_token_id": 0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 128,
        "rope_parameters": _SHORT_LONGROPE,
        "tie_word_embeddings": True,
    },
    "granite": {"model_type": "granite", **_MULTIPLIERS},
    "granite-bias": {"model_type": "granite", **_MULTIPLIERS, "attention_bias": True},
    "smollm3": {"model_type": "smollm3", "pad_token_id": 0, "no_rope_layers": [1, 0, 1]},
    "smollm3-window": {
        "model_type": "smollm3",
        "pad_token_id": 0,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 16,
        "tie_word_embeddings": False,
    },
    "ministral3": {"model_type": "ministral3", "head_dim": 16, "rope_parameters": _GROWING_YARN},
}


def hf_model(family: str, *, seed: int = 0, **more: Any) -> Any:
    """A random transformers model in float32 whose norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {**_BASE, **FAMILIES[family], **more}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
    return model


def our_config(model: Any) -> ModelConfig:
    """Our reading of the config.json that transformers would write for its model."""
    return ModelConfig.from_dict(model.config.to_dict())


def our_decoder(model: Any, dtype: torch.dtype = torch.float32) -> Decoder:
    """Our decoder over the weights of a transformers model."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    config = our_config(model)
    shapes = tensor_shapes(config)

    def tensor(name: str) -> torch.Tensor:
        stored = (state[part] for part in parts(name, fused=config.fused))
        return assemble(name, shapes[name], stored)

    weights = build_weights(config, tensor)
    return Decoder(config, weights)
