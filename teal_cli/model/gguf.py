"""Reads a GGUF file: its tensors dequantised one at a time, its metadata turned into a config.

The gguf package knows the format and its quantizations. Tensors are read by offset rather than
through its memory map, so that the pages of a big file don't pile up in this process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.model.config import RopeConfig
from teal_cli.model.gguf_tokenizer import write_tokenizer
from teal_cli.model.hf_folder import to_finite
from teal_cli.model.rope import inverse_frequencies

# The architectures of ours that GGUF knows; a Mistral is a llama there.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CHUNK_ELEMENTS = 1 << 22  # dequantised at a time, in float32: 16 MB
_DAMAGED = "Download the file again."


class GgufFile:
    """A GGUF file under Hugging Face's names.

    Raises:
        MissingError: there is no such file.
        TealError: it is no GGUF file, is truncated, or lacks metadata.
        UnsupportedError: its architecture or one of its formats is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors, self._metadata = _open(path)
        self._names = {_hf_name(name): name for name in self._tensors}
        try:
            self.config = self._config()
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise TealError(
                f"{path}: the metadata hold something else than they should: {error}", hint=_DAMAGED
            ) from None

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def dtype(self) -> torch.dtype:
        """Dequantised weights are kept in float16: the scales of a GGUF file are float16 too."""
        return torch.float16

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, [out_features, in_features] as in Hugging Face's files."""
        return {
            name: tuple(int(n) for n in reversed(self._tensors[stored].shape))
            for name, stored in self._names.items()
            if stored != "rope_freqs.weight"  # already in the config, as llama3 scaling
        }

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor, dequantised, in `dtype`; the arguments and errors of HfFolder.read."""
        from gguf.quants import dequantize

        stored = self._tensors[self._names[name]]
        shape = self.shapes[name]
        rows, row_length = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
        row_bytes = stored.n_bytes // rows
        step = max(1, _CHUNK_ELEMENTS // row_length)
        out = torch.empty(rows, row_length, dtype=dtype)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            raw = np.fromfile(
                self.path,
                dtype=np.uint8,
                count=(stop - start) * row_bytes,
                offset=stored.data_offset + start * row_bytes,
            )
            if raw.nbytes != (stop - start) * row_bytes:
                raise TealError(f"{self.path} is truncated at {name}", hint=_DAMAGED)
            raw = raw.view(stored.data.dtype).reshape(stop - start, -1)
            try:
                values = dequantize(raw, stored.tensor_type)
            except NotImplementedError:
                raise UnsupportedError(
                    f"{name} is stored as {stored.tensor_type.name}, which the gguf package "
                    "cannot dequantise"
                ) from None
            chunk = torch.from_numpy(np.array(values, dtype=np.float32))
            out[start:stop] = to_finite(chunk, dtype, name, self.label)
        return self._in_hf_order(name, out.reshape(shape))

    def write_companions(self, folder: Path) -> None:
        """Write the tokenizer and the generation defaults that the metadata describes."""
        write_tokenizer(folder, self._metadata, self.config["max_position_embeddings"])
        ids = {k: v for k, v in self.config.items() if k.endswith("_token_id")}
        text = json.dumps(ids, indent=2)
        (folder / "generation_config.json").write_text(text, encoding="utf-8")

    def _in_hf_order(self, name: str, tensor: Tensor) -> Tensor:
        """GGUF interleaves the two halves of each rotary pair in llama's q and k; undo that."""
        kind = name.split(".")[-2]
        if self.config["model_type"] not in ("llama", "mistral") or kind not in (
            "q_proj",
            "k_proj",
        ):
            return tensor
        heads = self.config["num_attention_heads" if kind == "q_proj" else "num_key_value_heads"]
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def _config(self) -> dict[str, Any]:
        """The config.json that transformers would have beside these weights."""
        metadata, architecture = self._metadata, self._metadata.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise UnsupportedError(
                f"GGUF architecture {architecture!r} is not supported",
                hint=f"Supported: {', '.join(_ARCHITECTURES)}.",
            )
        if metadata.get("split.count", 1) > 1:
            raise UnsupportedError(
                f"{self.path.name} is one of {metadata['split.count']} parts",
                hint="Merge them with llama.cpp's gguf-split first.",
            )

        def need(key: str) -> Any:
            if f"{architecture}.{key}" not in metadata:
                raise TealError(f"{self.path}: the metadata lack {architecture}.{key}")
            return metadata[f"{architecture}.{key}"]

        heads = need("attention.head_count")
        head_dim = metadata.get(f"{architecture}.attention.key_length") or metadata.get(
            f"{architecture}.rope.dimension_count"
        )
        config = {
            "architectures": [_ARCHITECTURES[architecture]],
            "model_type": architecture,
            "hidden_act": "silu",
            "hidden_size": need("embedding_length"),
            "intermediate_size": need("feed_forward_length"),
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv", heads),
            "head_dim": head_dim or need("embedding_length") // heads,
            "vocab_size": self.shapes.get("model.embed_tokens.weight", (0,))[0],
            "max_position_embeddings": need("context_length"),
            "rms_norm_eps": _shortest(need("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(metadata.get(f"{architecture}.rope.freq_base", 10000.0)),
            "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self._names,
            "sliding_window": None,
            "tie_word_embeddings": "lm_head.weight" not in self._names,
            "dtype": "float16",
            **_token_ids(metadata),
        }
        if scaling := self._rope_scaling(architecture, config):
            config["rope_scaling"] = scaling
        return config

    def _rope_scaling(self, architecture: str, config: dict[str, Any]) -> dict[str, Any] | None:
        metadata = self._metadata
        if "rope_freqs.weight" in self._tensors:
            return self._llama3_scaling(config)
        kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
        if kind == "none":
            return None
        scaling = {
            "rope_type": kind,
            "factor": _shortest(metadata.get(f"{architecture}.rope.scaling.factor", 1.0)),
        }
        original = metadata.get(f"{architecture}.rope.scaling.original_context_length")
        if original is not None:
            scaling["original_max_position_embeddings"] = original
        return scaling

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """GGUF stores Llama 3.1's scaling as its effect: a divisor for each frequency."""
        divisors = self._tensors["rope_freqs.weight"].data
        scaling: dict[str, Any] = {
            "rope_type": "llama3",
            "factor": _shortest(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        given: dict[str, Any] = {k: v for k, v in scaling.items() if k != "rope_type"}
        theta, head_dim = config["rope_theta"], config["head_dim"]
        plain = inverse_frequencies(RopeConfig(theta=theta), head_dim)
        scaled = inverse_frequencies(RopeConfig(theta=theta, type="llama3", **given), head_dim)
        if len(divisors) != len(plain) or not np.allclose(plain / scaled, divisors, rtol=1e-3):
            raise UnsupportedError(f"{self.path}: its rotary frequencies are not Llama 3.1's")
        return scaling


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Descriptions of the tensors (data still on disk) and the metadata, by name."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """The package's reader, but it stops where the file does: its arrays could be endless."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **named: Any) -> Any:
            values = super()._get(offset, dtype, count, *order, **named)
            if len(values) < count:
                raise ValueError("it ends too early")
            return values

    if not path.is_file():
        raise MissingError(f"no file {path}")
    try:
        reader = Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
        raise TealError(
            f"{path} is not a GGUF file, or is truncated: {error}", hint=_DAMAGED
        ) from None
    return tensors, metadata


def _hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    words = name.split(".")
    if len(words) == 4 and words[0] == "blk" and words[2] in _LAYER:
        return f"model.layers.{words[1]}.{_LAYER[words[2]]}.{words[3]}"
    return name


def _shortest(value: float) -> float:
    """The decimal number that was meant: GGUF holds float32, where 1e-05 is 9.999999747e-06."""
    return float(str(np.float32(value)))


def _token_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    """bos_token_id, pad_token_id and, for every token that ends a text, turn or message, eos's."""
    count = len(metadata.get("tokenizer.ggml.tokens", ()))

    def named(kind: str) -> list[int]:
        number = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        return [number] if isinstance(number, int) and 0 <= number < count else []

    ends = list(dict.fromkeys([*named("eos"), *named("eot"), *named("eom")]))
    found = {"bos": named("bos"), "eos": ends, "pad": named("padding")}
    return {
        f"{name}_token_id": numbers[0] if len(numbers) == 1 else numbers
        for name, numbers in found.items()
        if numbers
    }
