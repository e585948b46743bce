"""What a model is, seen before it is converted."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from teal_cli.model.config import ModelConfig
from teal_cli.model.reader import open_reader
from teal_cli.model.tokenizer import complete_tokenizer, load_tokenizer
from teal_cli.pipeline import stored_checkpoint
from teal_cli.progress import Reporter, Silent
from teal_cli.store import hub
from teal_cli.store.models import ModelRef


@dataclass(frozen=True, slots=True)
class Preview:
    """What a model's files say; `dtype` is that of its floats once it is converted."""

    config: ModelConfig
    dtype: torch.dtype
    tokenizer: Any


def preview(
    ref: ModelRef,
    quantize: str | None = None,
    *,
    token: str | None = None,
    offline: bool = False,
    reporter: Reporter,
) -> Preview:
    """Read the headers and the tokenizer of a model, which is downloaded if it is not here.

    Args:
        ref: the model.
        quantize: the form that is wanted of it, in which a model of the Hub may be here alone.
        token: as for `hub.fetch`, like `offline` and `reporter`.

    Raises:
        AccessError, MissingError: the model cannot be had.
        UnsupportedError, TealError: it cannot be used.
    """
    stored = stored_checkpoint(ref, None, quantize) if ref.kind == "hub" else None
    if stored is not None:
        return Preview(stored.config, stored.dtype, stored.tokenizer())
    source = hub.fetch(ref, token=token, offline=offline, reporter=reporter)
    reader = open_reader(source)
    config = ModelConfig.from_dict(reader.config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reader.write_companions(folder, Silent())
        complete_tokenizer(folder, ref.name)
        tokenizer = load_tokenizer(folder, ref.name)
    return Preview(config, torch.float16 if source.gguf else reader.dtype, tokenizer)
