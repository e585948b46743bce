"""Reads a checkpoint in Hugging Face's format: config.json and safetensors, sharded or single."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.model.config import DAMAGED, read_object
from teal_cli.progress import Reporter

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
    "additional_chat_templates/*.jinja",
)
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class HfFolder:
    """The tensors of a folder under Hugging Face's names, read one at a time.

    Raises:
        MissingError: the folder holds no config.json or no safetensors, or lacks a shard.
        TealError: an index or shard is damaged or names a file outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_object(folder / "config.json")
        self._shard_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for shard in _shards(folder):
            self._open(shard)

    @property
    def label(self) -> str:
        return str(self.folder)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that counts: old files carry rotary tables, tied ones a copy."""
        copy = "lm_head.weight" if self.config.get("tie_word_embeddings") else None
        return {
            name: shape
            for name, shape in self._shapes.items()
            if name != copy and not name.endswith("rotary_emb.inv_freq")
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, and so of the matrices."""
        return _DTYPES.get(self._dtypes.get("model.embed_tokens.weight", ""), torch.float16)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor in `dtype`; memory-mapped where that is its own.

        Raises:
            UnsupportedError: it is stored in another format than float16, bfloat16 or float32.
            TealError: it holds NaN or infinity, or `dtype` cannot hold its values.
        """
        if self._dtypes[name] not in _DTYPES:
            raise UnsupportedError(
                f"{name} is stored as {self._dtypes[name]}; teal reads {', '.join(_DTYPES)}"
            )
        with safe_open(self._shard_of[name], framework="pt") as shard:
            tensor = shard.get_tensor(name)
        return to_finite(tensor, dtype, name, self.label)

    def write_companions(self, folder: Path, reporter: Reporter) -> None:
        """Copy the tokenizer and the generation defaults."""
        for name in _COMPANIONS:
            for file in self.folder.glob(name):
                if file.is_file():
                    target = folder / file.relative_to(self.folder)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, target)

    def _open(self, path: Path) -> None:
        if not os.path.isfile(path):  # pathlib's own would raise on a name that is none
            raise MissingError(f"{path.name!r} is missing from {self.folder}", hint=DAMAGED)
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    if name in self._shard_of:
                        raise TealError(f"{name} is in two shards of {self.folder}")
                    view = shard.get_slice(name)
                    self._shard_of[name] = path
                    self._shapes[name] = tuple(view.get_shape())
                    self._dtypes[name] = view.get_dtype()
        except (SafetensorError, OSError) as error:
            raise TealError(f"{path} is truncated or damaged: {error}", hint=DAMAGED) from None


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
        if target.isfinite().all():
            continue
        if source.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise TealError(
                f"{name} of {label} has values that {kind} cannot hold",
                hint="Convert with --dtype bfloat16.",
            )
        raise TealError(f"{name} of {label} holds NaN or infinite weights", hint=DAMAGED)
    return out


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.exists():
            raise MissingError(
                f"no model.safetensors and no index of shards in {folder}",
                hint="Name a model that is published as safetensors, or a .gguf file.",
            )
        return [single]
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise TealError(f"{index} has no weight_map", hint=DAMAGED)
    for name in names.values():
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
            raise TealError(f"{index} names a shard outside its folder: {name!r}")
    return [folder / name for name in sorted(set(names.values()))]
