"""Turns a Hugging Face folder or a GGUF file into the decoder's layout, one tensor at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_cli.model.checkpoint import KIND, MANIFEST, Checkpoint
from teal_cli.model.config import ModelConfig
from teal_cli.model.hf_layout import assemble, hf_shapes, parts
from teal_cli.model.shards import plan_shards, write_shard
from teal_cli.model.weights import tensor_shapes
from teal_cli.progress import Reporter
from teal_cli.store import artifacts, paths

if TYPE_CHECKING:
    from teal_cli.store.hub import Source

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 4 * 10**9


class TensorReader(Protocol):
    """A checkpoint of another format, under Hugging Face's names."""

    config: dict[str, Any]

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

    def write_companions(self, folder: Path) -> None:
        """Write the tokenizer and the generation defaults."""


def convert(
    source: Source, *, dtype: str | None = None, reporter: Reporter, force: bool = False
) -> Path:
    """Convert a model, unless that is done already; peak memory is a few of its largest tensors.

    Args:
        source: the fetched model.
        dtype: float16, bfloat16 or float32; None keeps the source's own (GGUF: float16).
        reporter: told what is written where.
        force: convert even if an up-to-date checkpoint is there.

    Returns:
        The checkpoint's folder.

    Raises:
        UsageError: `dtype` is not one of the three.
        MissingError, UnsupportedError, TealError: the source lacks something, is of another
            architecture, is damaged, or the disk is full.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    reader: TensorReader | None = None
    if dtype is None:
        if source.gguf is not None:
            dtype = "float16"
        else:
            reader = open_reader(source)
            dtype = str(reader.dtype).removeprefix("torch.")
    folder = paths.model_dir(source.ref.slug) / dtype
    if not force and _up_to_date(folder, source):
        return folder
    with artifacts.lock(folder, reporter):
        if force or not _up_to_date(folder, source):
            _convert(source, reader or open_reader(source), DTYPES[dtype], folder, reporter)
    return folder


def open_reader(source: Source) -> TensorReader:
    """The reader of the format that the source is in; reads headers only."""
    if source.gguf is not None:
        from teal_cli.model.gguf import GgufFile

        return GgufFile(source.gguf)
    from teal_cli.model.hf_folder import HfFolder

    assert source.folder is not None
    return HfFolder(source.folder)


def _up_to_date(folder: Path, source: Source) -> bool:
    try:
        checkpoint = Checkpoint(folder)
    except TealError:
        return False
    return checkpoint.source_fingerprint == source.fingerprint


def _convert(
    source: Source, reader: TensorReader, dtype: torch.dtype, folder: Path, reporter: Reporter
) -> None:
    config = ModelConfig.from_dict(reader.config)
    _check_tensors(reader, config)
    shapes = tensor_shapes(config)
    total_bytes = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    reporter.note(f"converting {source.ref.name} to {name}, {total_bytes / 1e9:.2f} GB → {folder}")
    artifacts.check_free_space(folder, total_bytes)

    canonical = json.dumps(dataclasses.asdict(config), sort_keys=True)
    digest = hashlib.sha256(f"{canonical} {name}".encode())
    with artifacts.atomic_dir(folder) as temporary:
        reader.write_companions(temporary)
        text = json.dumps(reader.config, indent=2, ensure_ascii=False)
        (temporary / "config.json").write_text(text, encoding="utf-8")
        sizes = {}
        with reporter.task("Converting", total_bytes, "B") as task:
            for shard, group in plan_shards(shapes, dtype, SHARD_BYTES).items():
                tensors = _assembled(reader, group, dtype)
                path = temporary / shard
                write_shard(path, group, dtype, tensors, digest=digest, progress=task.advance)
                sizes[shard] = path.stat().st_size
        manifest = {
            "model": source.ref.name,
            "revision": source.revision,
            "source": source.fingerprint,
            "dtype": name,
            "shards": sizes,
            "fingerprint": digest.hexdigest(),
        }
        artifacts.write_manifest(temporary / MANIFEST, KIND, manifest)


def _assembled(
    reader: TensorReader, names: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[Tensor]:
    for name, shape in names.items():
        yield assemble(name, shape, (reader.read(part, dtype) for part in parts(name)))


def _check_tensors(reader: TensorReader, config: ModelConfig) -> None:
    """Every tensor that the config asks for is there in its shape, and no other."""
    expected, found = hf_shapes(config), reader.shapes
    for problem, names in (
        ("lacks", expected.keys() - found.keys()),
        (f"holds what a {config.model_type} model does not have:", found.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise TealError(f"{reader.label} {problem} {min(names)}{more}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise TealError(
                f"{name} of {reader.label} has shape {list(found[name])}, "
                f"but its config.json says {list(shape)}"
            )
