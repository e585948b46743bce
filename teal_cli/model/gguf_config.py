"""A GGUF file's metadata as the config.json that transformers would have beside its weights.

What llama.cpp reads of them is honoured as it does, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.rope_config import yarn_scale

# The families of ours that GGUF knows; a Mistral is a llama there, or a mistral3 as Ministral 3 is.
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_FREQUENCIES = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_ARCHITECTURES = ("mistral3", *(name for name in _CLASSES if name != "ministral3"))
# Granite's scales, which transformers calls multipliers. 0 stands for none, but of the logits.
_SCALES = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_GROWTH = "attention.temperature_scale"
# Metadata of `_NEUTRAL` that an architecture obeys after all.
_OBEYED = {
    "granite": tuple(_SCALES),
    "mistral3": (_GROWTH, "rope.scaling.yarn_log_multiplier"),
    "phi3": ("rope.dimension_count",),
}
_TOKENS = "tokenizer.ggml.tokens"
# What `general.type` calls a file that is no model.
_NO_MODEL = {
    "adapter": "a LoRA adapter",
    "mmproj": "the projector of a vision model",
    "imatrix": "an importance matrix",
}
# Metadata that would change the computation: the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.sliding_window_pattern": (),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "deepstack_mapping": (),
    "embedding_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.dimension_sections": (),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}


def rope_tensors(architecture: str) -> tuple[str, ...]:
    """Tensors that say how rope turns, and so become a part of the config."""
    return (_SHORT, _LONG) if architecture == "phi3" else (_FREQUENCIES,)


def hf_config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The config, without the ids of special tokens.

    Args:
        metadata: by GGUF's keys.
        tensors: the gguf package's descriptions, by GGUF's names.

    Raises:
        TealError: something is missing.
        UnsupportedError: the file is no model, or of another architecture, or computes what the
            decoder does not.
    """
    own = _Own(_architecture(metadata), metadata)
    _check_experts(own, tensors)
    heads, hidden_size = own.need("attention.head_count"), own.need("embedding_length")
    rows = _rows(tensors, "blk.0.attn_q.weight")
    head_dim = own.get("attention.key_length") or (rows or hidden_size) // heads
    _check_neutral(own, head_dim)
    vocab_size, tokens = _rows(tensors, "token_embd.weight"), metadata.get(_TOKENS, ())
    if vocab_size is not None and len(tokens) > vocab_size:
        raise TealError(f"the tokenizer has {len(tokens)} tokens, the embedding {vocab_size} rows")
    context = own.need("context_length")
    config: dict[str, Any] = {
        **_family(own, tensors),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": own.need("feed_forward_length"),
        "num_hidden_layers": own.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size or 0,
        "max_position_embeddings": context,
        "rms_norm_eps": _shortest(own.need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(own.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float16",
    }
    rotary_dim = own.get("rope.dimension_count", head_dim)
    if scaling := _rope_scaling(own, tensors, context, rotary_dim):
        config["rope_scaling"] = scaling
    if own.architecture == "granite":
        config |= _multipliers(own, head_dim)
    if own.architecture == "phi3":
        config["partial_rotary_factor"] = rotary_dim / head_dim
        config["original_max_position_embeddings"] = _original_context(own, context)
    return config


class _Own:
    """The metadata below the architecture's name; lists of one value a layer as that value."""

    def __init__(self, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.architecture, self._metadata = architecture, metadata

    def get(self, key: str, default: Any = None) -> Any:
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, list) or key in _NEUTRAL:
            return value
        if len(set(value)) != 1:
            raise UnsupportedError(f"layers of different sizes ({key}) are not supported")
        return value[0]

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise TealError(f"the metadata lack {self.architecture}.{key}")
        if isinstance(value, (str, bool)):
            raise TealError(f"{self.architecture}.{key} in the metadata is {value!r}, no number")
        return value


def _architecture(metadata: Mapping[str, Any]) -> str:
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type")
    if kind in _NO_MODEL or architecture == "clip":
        what = _NO_MODEL[kind if kind in _NO_MODEL else "mmproj"]
        raise UnsupportedError(f"it holds {what}, no model", hint="Name the model's own file.")
    if architecture is None:
        raise TealError("the metadata lack general.architecture")
    if architecture not in _ARCHITECTURES:
        moe = ", a mixture of experts," if "moe" in str(architecture) else ""
        raise UnsupportedError(
            f"GGUF architecture {architecture!r}{moe} is not supported",
            hint=f"Supported: {', '.join(_ARCHITECTURES)}.",
        )
    return str(architecture)


def _check_experts(own: _Own, tensors: Iterable[str]) -> None:
    # Older files of Mixtral have a tensor an expert: blk.0.ffn_gate.7.weight.
    routed = any("_exps." in name or ".ffn_gate_inp." in name for name in tensors)
    if own.get("expert_count", 0) or routed:
        raise UnsupportedError("a mixture of experts (as Mixtral is one) is not supported")


def _check_neutral(own: _Own, head_dim: int) -> None:
    """Refuse what the decoder does not compute."""
    obeyed = _OBEYED.get(own.architecture, ())
    found = {key: own.get(key) for key in _NEUTRAL if key not in obeyed}
    for key, value in found.items():
        if value is not None and value not in _NEUTRAL[key]:
            raise UnsupportedError(f"GGUF metadata {key} = {value!r} are not supported")
    if own.architecture == "granite" and own.get("rope.scaling.finetuned") is False:
        raise UnsupportedError("a granite without rope (rope.scaling.finetuned) is not supported")
    scale = own.get("attention.scale") or 0.0
    if (
        scale
        and "attention.scale" not in obeyed
        and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-4)
    ):
        raise UnsupportedError(f"an attention.scale of {scale:g} is not supported")
    for key, what in (
        ("attention.value_length", "values as wide as keys"),
        ("rope.dimension_count", "rope over the whole head"),
    ):
        if key not in obeyed and own.get(key, head_dim) != head_dim:
            raise UnsupportedError(
                f"{key} is {own.get(key)} where a head has {head_dim}: teal knows {what} only"
            )


def _family(own: _Own, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say which family of ours computes the same."""
    family, window = own.architecture, None
    o_bias = "blk.0.attn_output.bias" in tensors
    if family in ("llama", "mistral", "phi3"):
        window = own.get("attention.sliding_window") or None
    if family == "mistral3":
        family = "ministral3" if own.get(_GROWTH) else "mistral"
    if family in ("llama", "mistral"):
        if window is not None:
            family = "mistral"
        elif "blk.0.attn_q.bias" in tensors and not o_bias:
            family = "qwen2"  # a Llama with biases on q, k and v alone
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "attention_bias": o_bias,
        "sliding_window": window,
    }


def _multipliers(own: _Own, head_dim: int) -> dict[str, float]:
    usual = {"attention.scale": head_dim**-0.5}
    found = {key: own.get(key) or usual.get(key, 1.0) for key in _SCALES}
    found["logit_scale"] = own.need("logit_scale")
    return {_SCALES[key]: _shortest(value) for key, value in found.items()}


def _original_context(own: _Own, context: int) -> int:
    return int(own.get("rope.scaling.original_context_length") or context)


def _rope_scaling(
    own: _Own, tensors: Mapping[str, Any], context: int, rotary_dim: int
) -> dict[str, Any] | None:
    """Rope's scaling in transformers' words, and how queries grow; None is neither."""
    scaling = _frequencies(own, tensors, context, rotary_dim)
    if growth := own.get(_GROWTH):
        scaling = scaling or {"rope_type": "default"}
        scaling["llama_4_scaling_beta"] = _shortest(growth)
        scaling["original_max_position_embeddings"] = _original_context(own, context)
    return scaling


def _frequencies(
    own: _Own, tensors: Mapping[str, Any], context: int, rotary_dim: int
) -> dict[str, Any] | None:
    """None, linear, yarn, or a divisor a frequency."""
    attention = _shortest(own.get("rope.scaling.attn_factor", 1.0))
    if _SHORT in rope_tensors(own.architecture) and _SHORT in tensors:
        return {
            "rope_type": "longrope",
            "short_factor": _divisors(tensors, _SHORT).tolist(),
            "long_factor": _divisors(tensors, _LONG).tolist(),
            "attention_factor": attention,
        }
    frequencies = tensors.get(_FREQUENCIES)
    kind = own.get("rope.scaling.type", "linear")  # llama.cpp's own default
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"rope scaling {kind!r} is not supported; teal knows linear, yarn")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0))
    factor = _shortest(factor or 1.0) if kind != "none" else 1.0
    original = _original_context(own, context)
    blend = own.get("rope.scaling.yarn_ext_factor", -1.0)
    if blend not in (-1, 1 if kind == "yarn" else 0):
        raise UnsupportedError(f"a rope.scaling.yarn_ext_factor of {blend:g} is not supported")
    all_dim = _shortest(own.get("rope.scaling.yarn_log_multiplier") or 0.0)
    if kind == "yarn":
        if frequencies is not None:
            raise UnsupportedError("yarn together with rope_freqs.weight is not supported")
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            # On top of YaRN's own, where transformers' replaces it.
            "attention_factor": attention * yarn_scale(factor) / yarn_scale(factor, all_dim),
        }
        for key in ("beta_fast", "beta_slow"):
            if beta := own.get(f"rope.scaling.yarn_{key}"):
                scaling[key] = _shortest(beta)
        return scaling if (factor, attention) != (1, 1) else None
    if frequencies is None and attention == 1:
        linear = {"rope_type": "linear", "factor": factor}
        return {**linear, "original_max_position_embeddings": original} if factor != 1 else None
    # Llama 3.1's scaling is stored as its effect. transformers has such divisors in longrope.
    divisors = [factor] * (rotary_dim // 2)
    if frequencies is not None:
        divisors = (_divisors(tensors, _FREQUENCIES) * np.float32(factor)).tolist()
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "factor": factor,
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


def _divisors(tensors: Mapping[str, Any], name: str) -> np.ndarray:
    values = tensors[name].read(0, math.prod(tensors[name].shape[1:])).reshape(-1)
    if not (values > 0).all():
        raise TealError(f"{name} holds what is not above 0")
    return values


def _rows(tensors: Mapping[str, Any], name: str) -> int | None:
    """A matrix's rows, which GGUF names last."""
    return tensors[name].shape[-1] if name in tensors else None


def _shortest(value: float) -> float:
    """The decimal number that was meant: GGUF holds float32, where 1e-05 is 9.999999747e-06."""
    return float(str(np.float32(value)))
