"""What a checkpoint of any format gives to the converter, and whether it holds the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.config import ModelConfig
from teal_cli.model.hf_layout import hf_shapes
from teal_cli.progress import Reporter

if TYPE_CHECKING:
    from teal_cli.store.hub import Source


class TensorReader(Protocol):
    """A checkpoint of another format, under Hugging Face's names."""

    # Whether the format's own program refuses a tensor that the model does not use.
    strict: bool

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says of the model, as far as its tensors agree."""

    @property
    def label(self) -> str:
        """Where it is, for messages."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it converts to when nobody asks for another."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor, finite, in `dtype`."""

    def write_companions(self, folder: Path, reporter: Reporter) -> None:
        """Write the tokenizer and the generation defaults."""


def open_reader(source: Source) -> TensorReader:
    """The reader of the format that the source is in; reads headers only."""
    if source.gguf is not None:
        from teal_cli.model.gguf import GgufFile

        return GgufFile(source.gguf)
    from teal_cli.model.hf_folder import HfFolder

    assert source.folder is not None
    return HfFolder(source.folder)


def check_tensors(reader: TensorReader, config: ModelConfig, reporter: Reporter) -> None:
    """Every tensor that the config asks for is there in its shape; others are named.

    Raises:
        TealError: one is missing or of another shape, or a strict format holds others.
        UnsupportedError: they are those of a mixture of experts, or of an adapter.
    """
    expected, found = hf_shapes(config), reader.shapes
    spare = found.keys() - expected.keys()
    missing = expected.keys() - found.keys()
    if missing and (experts := [name for name in spare if "expert" in name or "_exps." in name]):
        raise UnsupportedError(
            f"{reader.label} is a mixture of experts, which is not supported: it holds "
            f"{_some(experts)}"
        )
    if missing:
        instead = f"It holds {_some(spare)} instead." if spare else None
        raise TealError(f"{reader.label} lacks {_some(missing)}", hint=instead)
    for name, shape in expected.items():
        if found[name] != shape:
            raise TealError(
                f"{name} of {reader.label} has shape {list(found[name])}, "
                f"but its config.json says {list(shape)}"
            )
    if adapters := [name for name in spare if ".lora_" in name]:
        raise UnsupportedError(
            f"{reader.label} holds an adapter (LoRA) beside the model: {_some(adapters)}",
            hint="Merge it first, with peft's merge_and_unload().",
        )
    if spare and reader.strict:
        raise TealError(
            f"{reader.label} holds what a {config.model_type} model of "
            f"{config.num_hidden_layers} layers does not have: {_some(spare)}"
        )
    if spare:
        reporter.note(
            f"passed over, since a {config.model_type} model of {config.num_hidden_layers} layers "
            f"does not use it: {_some(spare)}"
        )


def _some(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first
