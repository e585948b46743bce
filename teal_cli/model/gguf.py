"""Reads a GGUF file: its tensors dequantised one at a time, its metadata turned into a config.

The gguf package knows the format and its quantizations. Tensors are read by offset rather than
through its memory map, so that the pages of a big file don't pile up in this process.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.model.config import ModelConfig
from teal_cli.model.gguf_config import hf_config
from teal_cli.model.gguf_tokenizer import write_tokenizer
from teal_cli.model.hf_folder import to_finite
from teal_cli.model.hf_layout import hf_shapes
from teal_cli.store.local import GGUF_MAGIC, gguf_parts

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
_VERSIONS = (2, 3)
_DAMAGED = "Download the file again."
_OTHER_FORMAT = "Take another .gguf file of the model, such as Q4_K_M or Q8_0, or its safetensors."


class GgufFile:
    """A GGUF file under Hugging Face's names.

    Raises:
        MissingError: there is no such file.
        TealError: it is no GGUF file, is truncated, or lacks metadata.
        UnsupportedError: its architecture or one of its formats is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors, self._part_of, self._metadata = _open_parts(path)
        try:
            self.config = {**hf_config(self._metadata, self._tensors), **_token_ids(self._metadata)}
        except TealError as error:
            raise type(error)(f"{path}: {error.message}", hint=error.hint) from None
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise TealError(
                f"{path}: the metadata hold something else than they should: {error}", hint=_DAMAGED
            ) from None
        self._names = {
            _hf_name(name): name
            for name in self._tensors
            if name != "rope_freqs.weight"  # already in the config, as rope's divisors
        }
        self._check()

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
                self._part_of[stored.name],
                dtype=np.uint8,
                count=(stop - start) * row_bytes,
                offset=stored.data_offset + start * row_bytes,
            )
            if raw.nbytes != (stop - start) * row_bytes:
                raise TealError(f"{self.path} is truncated at {name}", hint=_DAMAGED)
            raw = raw.view(stored.data.dtype).reshape(stop - start, -1)
            values = dequantize(raw, stored.tensor_type)
            chunk = torch.from_numpy(np.array(values, dtype=np.float32))
            out[start:stop] = to_finite(chunk, dtype, name, self.label)
        return self._in_hf_order(name, out.reshape(shape))

    def write_companions(self, folder: Path) -> None:
        """Write the tokenizer and the generation defaults that the metadata describes."""
        write_tokenizer(folder, self._metadata, self.config["max_position_embeddings"])
        ids = {k: v for k, v in self.config.items() if k.endswith("_token_id")}
        text = json.dumps(ids, indent=2)
        (folder / "generation_config.json").write_text(text, encoding="utf-8")

    def _check(self) -> None:
        """Refuse, before anything is written, what could not be read or would be left out."""
        architecture = self._metadata["general.architecture"]
        extra = self._names.keys() - hf_shapes(ModelConfig.from_dict(self.config)).keys()
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise UnsupportedError(
                f"{self.path} holds what a {architecture} model does not have: "
                f"{self._names[min(extra)]}{more}"
            )
        kinds = {tensor.tensor_type: name for name, tensor in self._tensors.items()}
        for kind, name in kinds.items():
            if not _is_readable(kind):
                raise UnsupportedError(
                    f"{name} of {self.path} is stored as {kind.name}, which the gguf package "
                    "cannot dequantise",
                    hint=_OTHER_FORMAT,
                )

    def _in_hf_order(self, name: str, tensor: Tensor) -> Tensor:
        """GGUF interleaves the two halves of each rotary pair in llama's q and k; undo that."""
        kind = name.split(".")[-2]
        if self._metadata["general.architecture"] not in ("llama", "mistral") or kind not in (
            "q_proj",
            "k_proj",
        ):
            return tensor
        heads = self.config["num_attention_heads" if kind == "q_proj" else "num_key_value_heads"]
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _open_parts(path: Path) -> tuple[dict[str, Any], dict[str, Path], dict[str, Any]]:
    """Descriptions of a model's tensors, the file that holds each, and the first part's metadata.

    Raises:
        MissingError: a part is not there.
        TealError: a file is damaged, or belongs to another model.
        UnsupportedError: a file is in a format that is not read.
    """
    parts = gguf_parts(path)
    tensors: dict[str, Any] = {}
    part_of: dict[str, Path] = {}
    metadata: dict[str, Any] = {}
    for number, part in enumerate(parts):
        found, own = _open(part)
        count = own.get("split.count", 0) or 1
        if count != len(parts) and len(parts) == 1:
            raise UnsupportedError(
                f"{path} is one of {count} parts of a model, and is not named so",
                hint=f"Name the parts as gguf-split does: {path.stem}-00001-of-{count:05}.gguf",
            )
        metadata = metadata or own
        same = own.get("split.tensors.count") == metadata.get("split.tensors.count")
        if (own.get("split.no", 0), count) != (number, len(parts)) or not same:
            raise TealError(f"{part} is not part {number + 1} of this model", hint=_DAMAGED)
        if twice := found.keys() & tensors.keys():
            raise TealError(f"{part} holds {min(twice)}, which an earlier part holds too")
        tensors |= found
        part_of |= dict.fromkeys(found, part)
    total = metadata.get("split.tensors.count", len(tensors)) if len(parts) > 1 else len(tensors)
    if total != len(tensors):
        raise TealError(
            f"the parts of {path} hold {len(tensors)} tensors, not {total}: they are of several "
            "models",
            hint=_DAMAGED,
        )
    return tensors, part_of, metadata


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
    _check_version(path)
    try:
        reader = Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
        if unknown := re.fullmatch(r"(\d+) is not a valid GGMLQuantizationType", str(error)):
            raise UnsupportedError(
                f"{path} holds tensors in a format that the gguf package does not know "
                f"(number {unknown[1]})",
                hint=_OTHER_FORMAT,
            ) from None
        raise TealError(
            f"{path} is not a GGUF file, or is truncated: {error}", hint=_DAMAGED
        ) from None
    return tensors, metadata


def _check_version(path: Path) -> None:
    """Refuse what begins as GGUF does, but is of another version or byte order."""
    with path.open("rb") as file:
        head = file.read(8)
    version = int.from_bytes(head[4:], "little")
    if head[:4] != GGUF_MAGIC or len(head) < 8 or version in _VERSIONS:
        return
    if version & 0xFFFF == 0:
        raise UnsupportedError(
            f"{path} is a big-endian GGUF file", hint="Take the little-endian file of the model."
        )
    raise UnsupportedError(
        f"{path} is of GGUF version {version}; teal reads {' and '.join(map(str, _VERSIONS))}",
        hint=_OTHER_FORMAT,
    )


def _hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    words = name.split(".")
    if len(words) == 4 and words[0] == "blk" and words[2] in _LAYER:
        return f"model.layers.{words[1]}.{_LAYER[words[2]]}.{words[3]}"
    return name


def _is_readable(kind: Any) -> bool:
    """Whether the gguf package can dequantise a format: it has one block of zeros to do."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _token_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    ids: dict[str, Any] = {
        f"{ours}_token_id": metadata[f"tokenizer.ggml.{theirs}_token_id"]
        for theirs, ours in names.items()
        if f"tokenizer.ggml.{theirs}_token_id" in metadata
    }
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and end_of_turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [i for i in (ids.get("eos_token_id"), end_of_turn) if i is not None]
    return ids
