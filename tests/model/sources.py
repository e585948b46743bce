"""Sources for the converter that no download made, and GGUF files written on the spot."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.convert import convert
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Silent
from teal_cli.store.hub import Source
from teal_cli.store.models import ModelRef

IDS = torch.arange(3, 43)
_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
# What llama.cpp's converter calls a family, and where it interleaves the rows of q and k.
ARCHITECTURES = {"mistral": "llama", "ministral3": "mistral3"}
_INTERLEAVED = ("llama", "granite", "smollm3", "mistral3")


def source_of(path: Path, name: str = "test-model") -> Source:
    """What fetching would return for a folder or a .gguf file."""
    gguf = path.suffix == ".gguf"
    files = [path] if gguf else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
    ref = ModelRef(kind="gguf" if gguf else "folder", name=name, path=path, revision=None)
    return Source(
        ref=ref,
        folder=None if gguf else path,
        gguf=path if gguf else None,
        fingerprint=digest.hexdigest(),
        revision=None,
    )


def converted(path: Path, **options: Any) -> Checkpoint:
    """The checkpoint that a folder or a .gguf file is converted to."""
    return Checkpoint(convert(source_of(path), **{"reporter": Silent(), **options}))


def logits(decoder: Decoder, thresholds: torch.Tensor | None = None) -> torch.Tensor:
    """What a decoder says after each of IDS, [T, vocab_size]."""
    with torch.no_grad():
        return decoder.logits(decoder.forward(IDS, thresholds=thresholds))


def save_folder(model: Any, folder: Path, **options: Any) -> Path:
    """A transformers model saved with a tokenizer that has its vocabulary's first tokens."""
    import tiny

    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_tokenizer(folder)
    model.save_pretrained(folder, **options)
    return folder


def write_gguf(
    path: Path,
    model: Any,
    *,
    quantization: str = "F32",
    tokenizer: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    drop: str | None = None,
    **writing: Any,
) -> Path:
    """Write a transformers model as llama.cpp's converter would.

    Matrices take `quantization`; norms and biases stay float32. Llama's q and k rows are
    interleaved, as llama.cpp's converter does; a Mistral is a llama there. Tensors
    whose names hold `drop` are left out, and `tensors` added: arrays, or bytes and their format.
    A value of `metadata` that is None takes the key out.
    `writing` are options of GGUFWriter: with split_max_tensors the file comes in parts, and the
    first of them is returned.
    """
    import gguf

    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture, **writing)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    own = _OF_FAMILIES.get(config.model_type, lambda config: {})(config)
    for key, value in own.items():
        writer.add_key_value(f"{architecture}.{key}", value, _value_type(value))
    for kind in ("short", "long"):
        if divisors := config.rope_parameters.get(f"{kind}_factor"):
            values = np.array(divisors, np.float32)
            tensors = {**(tensors or {}), f"rope_factors_{kind}.weight": values}
    _add_tokenizer(writer, tokenizer or {}, config.vocab_size)
    for key, value in (metadata or {}).items():
        if value is None:
            writer.kv_data[0].pop(key)
        elif key == "general.alignment":  # the writer lays the tensors out by it
            writer.add_custom_alignment(value)
        else:
            writer.add_key_value(key, value, _value_type(value))

    kind = gguf.GGMLQuantizationType[quantization]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if drop is not None and drop in name:
            continue
        if architecture in _INTERLEAVED and ".q_proj." in name:
            tensor = _interleaved(tensor, config.num_attention_heads)
        if architecture in _INTERLEAVED and ".k_proj." in name:
            tensor = _interleaved(tensor, config.num_key_value_heads)
        values = tensor.float().contiguous().numpy()
        if values.ndim == 2 and quantization != "F32":
            writer.add_tensor(_gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(name), values)
    for name, values in (tensors or {}).items():
        values, kind = values if isinstance(values, tuple) else (values, None)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.is_file() else next(iter(sorted(path.parent.glob(f"{path.stem}-00001-*"))))


def _granite_keys(config: Any) -> dict[str, Any]:
    return {
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _phi3_keys(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    head_dim = config.hidden_size // config.num_attention_heads
    original = config.original_max_position_embeddings
    keys = {
        "rope.dimension_count": int(rope.get("partial_rotary_factor", 1.0) * head_dim),
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.sliding_window or 0,
    }
    scale = config.max_position_embeddings / original
    if "long_factor" in rope:
        keys["rope.scaling.attn_factor"] = (1 + math.log(scale) / math.log(original)) ** 0.5
    return keys


def _ministral3_keys(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"],
        "attention.temperature_scale": rope["llama_4_scaling_beta"],
    }


_OF_FAMILIES = {"granite": _granite_keys, "phi3": _phi3_keys, "ministral3": _ministral3_keys}


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return (
        tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
        .swapaxes(1, 2)
        .reshape(tensor.shape)
    )


def _gguf_name(name: str) -> str:
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    _, _, index, *kind, suffix = name.split(".")
    return f"blk.{index}.{_GGUF_NAMES['.'.join(kind)]}.{suffix}"


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], vocab_size: int) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    plain = ["<s>", "</s>", *alphabet][: vocab_size - 1]
    plain += [f"<unused{i}>" for i in range(vocab_size - 1 - len(plain))]
    plain.append('!"')
    writer.add_tokenizer_model(tokenizer.get("model", "gpt2"))
    if (pre := tokenizer.get("pre", "default")) is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokenizer.get("tokens", plain))
    writer.add_token_types(tokenizer.get("types", [3, 3, *[1] * (vocab_size - 2)]))
    if "scores" in tokenizer:
        writer.add_token_scores(tokenizer["scores"])
    else:
        writer.add_token_merges(tokenizer.get("merges", ['! "']))
    writer.add_bos_token_id(tokenizer.get("bos", 0))
    writer.add_eos_token_id(tokenizer.get("eos", 1))


def _value_type(value: Any) -> Any:
    import gguf

    return gguf.GGUFValueType.get_type(value)
