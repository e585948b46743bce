"""Reads a GGUF file as if it were a checkpoint of Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.config import ModelConfig
from teal_cli.model.gguf_config import hf_config, rope_tensors
from teal_cli.model.gguf_header import DAMAGED
from teal_cli.model.gguf_tensors import GgufTensors
from teal_cli.model.gguf_tokenizer import write_tokenizer
from teal_cli.model.hf_layout import hf_shapes
from teal_cli.progress import Reporter

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_gate_up": "mlp.gate_up_proj",  # ffn_up in the file of a family that has them fused
    "ffn_down": "mlp.down_proj",
}
# Architectures of which llama.cpp rotates neighbouring channels.
_INTERLEAVED = ("llama", "mistral", "mistral3", "granite", "smollm3")


class GgufFile:
    """A GGUF file under Hugging Face's names.

    Raises:
        MissingError: there is no such file, or a part of it is missing.
        TealError: it is no GGUF file, is truncated, or lacks metadata.
        UnsupportedError: its architecture, one of its formats or of its metadata is not supported.
    """

    strict = True  # llama.cpp counts the tensors

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored = GgufTensors(path)
        metadata, tensors = self._stored.metadata, self._stored.tensors
        try:
            self.config = {**hf_config(metadata, tensors), **_token_ids(metadata)}
        except TealError as error:
            raise type(error)(f"{path}: {error.message}", hint=error.hint) from None
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise TealError(
                f"{path}: the metadata hold something else than they should: {error}", hint=DAMAGED
            ) from None
        self._architecture = metadata["general.architecture"]
        in_config = rope_tensors(self._architecture)
        self._names = {
            _hf_name(name, fused=self._architecture == "phi3"): name
            for name in tensors
            if name not in in_config
        }
        self._check_names()

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
        return {name: self._stored.shape(stored) for name, stored in self._names.items()}

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor, dequantised, in `dtype`; the arguments and errors of HfFolder.read."""
        return self._in_hf_order(name, self._stored.read(self._names[name], dtype))

    def write_companions(self, folder: Path, reporter: Reporter) -> None:
        """Write the tokenizer and the generation defaults that the metadata describes."""
        length = self.config["max_position_embeddings"]
        write_tokenizer(folder, self._stored.metadata, length, reporter)
        ids = {k: v for k, v in self.config.items() if k.endswith("_token_id")}
        text = json.dumps(ids, indent=2)
        (folder / "generation_config.json").write_text(text, encoding="utf-8")

    def _check_names(self) -> None:
        """Refuse tensors that would be left out; llama.cpp takes no file with such either."""
        extra = self._names.keys() - hf_shapes(ModelConfig.from_dict(self.config)).keys()
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise UnsupportedError(
                f"{self.path} holds what a {self._architecture} model does not have: "
                f"{self._names[min(extra)]}{more}"
            )

    def _in_hf_order(self, name: str, tensor: Tensor) -> Tensor:
        """GGUF interleaves the two halves of each rotary pair in some q and k; undo that."""
        kind = name.split(".")[-2]
        if self._architecture not in _INTERLEAVED or kind not in ("q_proj", "k_proj"):
            return tensor
        heads = self.config["num_attention_heads" if kind == "q_proj" else "num_key_value_heads"]
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _hf_name(name: str, *, fused: bool) -> str:
    if name in _TOP:
        return _TOP[name]
    words = name.split(".")
    if fused and words[2:3] == ["ffn_up"]:
        words[2] = "ffn_gate_up"
    if len(words) == 4 and words[0] == "blk" and words[2] in _LAYER:
        return f"model.layers.{words[1]}.{_LAYER[words[2]]}.{words[3]}"
    return name


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
