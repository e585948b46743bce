"""Reads a checkpoint in Hugging Face's format: config.json and safetensors, sharded or single.

What came quantized is decoded as it is read (`prequantized`).
"""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model import prequantized
from teal_cli.model.config import DAMAGED, read_object
from teal_cli.model.families import language_model
from teal_cli.model.tensor_files import TensorFiles, check_is_model
from teal_cli.progress import Reporter
from teal_cli.store.local import has_file

# Whatever a tokenizer or a chat may need; never weights and never code.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_NAMED_TEMPLATES = "additional_chat_templates/*.jinja"
# JSON objects of a few fields, whose faults the libraries do not name.
_SETTINGS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
# What is read, and what it converts to when nobody asks for another dtype.
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float32,
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class HfFolder:
    """The tensors of a folder under Hugging Face's names, read one at a time.

    Raises:
        MissingError: the folder holds no config.json or no safetensors, or lacks a shard.
        UnsupportedError: it holds an adapter or a model of another format, or is quantized in a
            way that teal does not decode.
        TealError: an index or shard is damaged or names a file outside the folder.
    """

    strict = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_is_model(folder)
        self._raw = language_model(read_object(folder / "config.json"))
        self._format = prequantized.format_of(self._raw, folder)
        self._files = TensorFiles(folder, self._raw)
        self._modules: dict[str, str] = {}
        if self._format is None:
            prequantized.refuse_unexplained(self._files)
        else:
            found = prequantized.modules(self._format, self._files)
            self._modules = {f"{module}.weight": module for module in found}
        names = {*self._files.shapes, *self._modules}
        # Of two that are tied, either may be the one that was saved.
        alone = self._tied and _HEAD in names and _EMBEDDING not in names
        self._embedding = _HEAD if alone else _EMBEDDING

    @property
    def label(self) -> str:
        return str(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, corrected where the tensors say otherwise, and without quantization."""
        config = {k: v for k, v in self._raw.items() if k not in prequantized.CONFIG_KEYS}
        if self._tied and self._has_own_head():
            config["tie_word_embeddings"] = False
        return config

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that counts: old files carry rotary tables, tied ones a copy."""
        copy = _HEAD if self.config.get("tie_word_embeddings") else None
        return {
            name: shape
            for name, shape in self._shapes.items()
            if name != copy and not name.endswith("rotary_emb.inv_freq")
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, and so of the matrices; of decoded ones, the config's."""
        named = self._raw.get("dtype") or self._raw.get("torch_dtype")
        if self._format is not None:
            for dtype in _DTYPES.values():
                if str(dtype) == f"torch.{named}":
                    return dtype
        for name in (self._embedding, "model.norm.weight"):
            if (stored := self._files.dtypes.get(name)) in _DTYPES:
                return _DTYPES[stored]
        return torch.float16

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor in `dtype`.

        Raises:
            UnsupportedError: it is stored in another format than a float of 16, 32 or 64 bits, and
                nothing says how to decode it.
            TealError: it holds NaN or infinity, or `dtype` cannot hold its values.
        """
        return to_finite(self._stored(name), dtype, name, self.label)

    def write_companions(self, folder: Path, reporter: Reporter) -> None:
        """Copy the tokenizer and the generation defaults.

        Raises:
            TealError: one of the files is none, or does not hold the settings that it should.
        """
        named = [self.folder / name for name in _COMPANIONS]
        for file in [*named, *self.folder.glob(_NAMED_TEMPLATES)]:
            if not has_file(file):  # another thing than a file there is not passed over
                continue
            if file.name in _SETTINGS:
                read_object(file)
            target = folder / file.relative_to(self.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)

    @property
    def _tied(self) -> bool:
        return bool(self._raw.get("tie_word_embeddings"))

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, with quantized matrices in place of their parts."""
        shapes = dict(self._files.shapes)
        if self._format is not None:
            for name, module in self._modules.items():
                for part in self._format.parts:
                    shapes.pop(f"{module}.{part}", None)
                shapes[name] = self._format.shape(module, self._files)
        if self._embedding == _HEAD:
            shapes[_EMBEDDING] = shapes[_HEAD]
        return shapes

    def _stored(self, name: str) -> Tensor:
        """The tensor in the dtype that it is stored in, or decoded to float32."""
        name = self._embedding if name == _EMBEDDING else name
        if self._format is not None and name in self._modules:
            return prequantized.decode(self._format, self._modules[name], self._files)
        stored = self._files.dtypes[name]
        if stored not in _DTYPES:
            raise UnsupportedError(
                f"{name} is stored as {stored}, and nothing says how to decode it; "
                f"teal reads {', '.join(_DTYPES)}"
            )
        return self._files.read(name)

    def _has_own_head(self) -> bool:
        """Whether a head is stored that is not the embedding: then the flag is wrong."""
        if self._embedding == _HEAD or not {_HEAD, _EMBEDDING} <= self._shapes.keys():
            return False
        if self._shapes[_HEAD] != self._shapes[_EMBEDDING]:
            return True
        if {_HEAD, _EMBEDDING} & self._modules.keys():
            return not self._stored(_HEAD).float().equal(self._stored(_EMBEDDING).float())
        return not self._files.equal(_HEAD, _EMBEDDING)


def to_finite(
    tensor: Tensor, dtype: torch.dtype, name: str, label: str, *, chunk: int = 1 << 22
) -> Tensor:
    """The tensor in `dtype`, checked for NaN and infinity a few megabytes at a time."""
    same = tensor.dtype == dtype
    out = tensor if same else torch.empty(tensor.shape, dtype=dtype)
    for source, target in zip(
        tensor.reshape(-1).split(chunk), out.reshape(-1).split(chunk), strict=True
    ):
        if not same:
            target.copy_(source)
        # A sum tells as much in a sixth of the time, unless it overflows.
        if target.sum(dtype=torch.float32).isfinite() or target.isfinite().all():
            continue
        if source.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise TealError(
                f"{name} of {label} has values that {kind} cannot hold",
                hint="Convert with --dtype bfloat16.",
            )
        raise TealError(f"{name} of {label} holds NaN or infinite weights", hint=DAMAGED)
    return out
