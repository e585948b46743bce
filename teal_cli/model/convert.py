"""Turns a Hugging Face folder or a GGUF file into the decoder's layout, one tensor at a time.

Where the result is quantized, the floats go straight from the source to the rounding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_cli.model.checkpoint import KIND, MANIFEST, Checkpoint, eos_token_ids
from teal_cli.model.config import ModelConfig
from teal_cli.model.hf_layout import assemble, parts
from teal_cli.model.quantization import Quantization, Quantized, tensors_of
from teal_cli.model.reader import TensorReader, check_tensors, open_reader
from teal_cli.model.rope_config import RopeConfig
from teal_cli.model.shards import plan_shards, write_shard
from teal_cli.model.tokenizer import complete_tokenizer, load_tokenizer
from teal_cli.model.weights import stored_tensors, tensor_shapes
from teal_cli.progress import Reporter
from teal_cli.store import artifacts, paths

if TYPE_CHECKING:
    from teal_cli.store.hub import Source

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 4 * 10**9
# Raised when a source may give another config than before: checkpoints of a lower number are then
# held against their source, and made again if they differ.
READING = 2
# Raised when the tokenizer or the generation defaults of a source come out otherwise than before:
# checkpoints of a lower number then get new ones, and keep their weights.
COMPANIONS = 2


Rounder = Callable[[str], Quantized]


class FloatWeights:
    """A source's tensors in the decoder's layout, each read when it is asked for."""

    def __init__(self, reader: TensorReader, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self._reader = reader
        # A tied lm_head is stored once it is quantized.
        self._shapes = tensor_shapes(dataclasses.replace(config, tie_word_embeddings=False))

    def __call__(self, name: str) -> Tensor:
        """The tensor of this name in a checkpoint; the errors of the reader."""
        source = name
        if name == "lm_head" and self.config.tie_word_embeddings:
            source = "embed_tokens"
        stored = parts(source, fused=self.config.fused)
        read = (self._reader.read(part, self.dtype) for part in stored)
        return assemble(source, self._shapes[name], read)


class Rounding(Protocol):
    """How matrices become integers."""

    @property
    def kind(self) -> Quantization:
        """What they become."""

    @property
    def asked(self) -> Mapping[str, Any]:
        """What the record of an earlier rounding has to say, to be taken for this one."""

    def begin(
        self,
        floats: FloatWeights,
        tokenizer: Callable[[], Any],
        work_dir: Path,
        reporter: Reporter,
    ) -> tuple[Rounder, dict[str, Any]]:
        """A function that rounds the tensors it is asked for, in their order; and its record.

        Args:
            floats: the model.
            tokenizer: gives its tokenizer.
            work_dir: for files of its own; removed with all that is in it.
            reporter: told what is read.
        """


@dataclass(frozen=True, slots=True)
class Nearest:
    """Every weight to the nearest integer."""

    kind: Quantization
    asked: Mapping[str, Any] = field(default_factory=dict)

    def begin(
        self,
        floats: FloatWeights,
        tokenizer: Callable[[], Any],
        work_dir: Path,
        reporter: Reporter,
    ) -> tuple[Rounder, dict[str, Any]]:
        return lambda name: self.kind.round(name, floats(name)), {"method": "nearest"}


def convert(
    source: Source,
    *,
    dtype: str | None = None,
    rounding: Rounding | None = None,
    reporter: Reporter,
    force: bool = False,
) -> Path:
    """Convert a model, unless that is done already; peak memory is a few of its largest tensors.

    Args:
        source: the fetched model.
        dtype: float16, bfloat16 or float32; None keeps the source's own (GGUF: float16).
        rounding: how to quantize it; None does not.
        reporter: told what is written where.
        force: convert even if an up-to-date checkpoint is there.

    Returns:
        The checkpoint's folder.

    Raises:
        UsageError: `dtype` is not one of the three.
        MissingError, UnsupportedError, TealError: the source lacks something, is of another
            architecture, is damaged, or cannot be quantized, or the disk is full.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    stamp = source.stamp
    reader: TensorReader | None = None
    if dtype is None:
        if source.gguf is not None:
            dtype = "float16"
        else:
            reader = open_reader(source)
            dtype = str(reader.dtype).removeprefix("torch.")
    kind = None if rounding is None else rounding.kind.name
    folder = paths.checkpoint_dir(source.ref.slug, dtype, kind)
    if not force and (checkpoint := _up_to_date(folder, source, rounding)):
        return renew_companions(checkpoint, source, reporter).folder
    with artifacts.lock(folder, reporter):
        if force or _up_to_date(folder, source, rounding) is None:
            reader = reader or open_reader(source)
            _convert(source, stamp, reader, DTYPES[dtype], rounding, folder, reporter)
    return folder


def renew_companions(checkpoint: Checkpoint, source: Source, reporter: Reporter) -> Checkpoint:
    """Make the files beside a checkpoint's weights again, where an older version made them.

    Args:
        checkpoint: it stays as it is if it came from other files than `source`.
        source: the model's files.
        reporter: told what is written where.

    Raises:
        MissingError, UnsupportedError, TealError: this version cannot use the tokenizer.
    """
    folder = checkpoint.folder
    if checkpoint.companions >= COMPANIONS or checkpoint.source_fingerprint != source.fingerprint:
        return checkpoint
    with artifacts.lock(folder, reporter):
        if Checkpoint(folder).companions < COMPANIONS:  # no other process has done it meanwhile
            manifest = artifacts.read_manifest(folder / MANIFEST, KIND)
            reporter.note(
                f"an older teal made the tokenizer of {checkpoint.name}; making it again → {folder}"
            )
            with artifacts.atomic_dir(folder) as temporary:
                shutil.copyfile(folder / "config.json", temporary / "config.json")
                open_reader(source).write_companions(temporary, reporter)
                complete_tokenizer(temporary, checkpoint.name)
                for shard in manifest["shards"]:
                    _share(folder / shard, temporary / shard)
                manifest["companions"] = COMPANIONS
                artifacts.write_manifest(temporary / MANIFEST, KIND, manifest)
    return Checkpoint(folder)


def _share(file: Path, copy: Path) -> None:
    """One file under two names; a copy where the file system has no links."""
    try:
        os.link(file, copy)
    except OSError:
        shutil.copyfile(file, copy)


def _up_to_date(folder: Path, source: Source, rounding: Rounding | None) -> Checkpoint | None:
    """The checkpoint that is there, if its weights are what would be made now."""
    try:
        checkpoint = Checkpoint(folder)
    except TealError:
        return None
    if checkpoint.source_fingerprint != source.fingerprint:
        return None
    if checkpoint.reading < READING and checkpoint.config != ModelConfig.from_dict(
        open_reader(source).config
    ):
        return None
    asked = {} if rounding is None else rounding.asked
    same = all(checkpoint.rounding.get(name) == value for name, value in asked.items())
    return checkpoint if same else None


def _convert(
    source: Source,
    stamp: str,
    reader: TensorReader,
    dtype: torch.dtype,
    rounding: Rounding | None,
    folder: Path,
    reporter: Reporter,
) -> None:
    config = ModelConfig.from_dict(reader.config)
    kind = None if rounding is None else rounding.kind
    check_tensors(reader, config, reporter)
    if kind is not None:
        kind.check(config)
    plan = stored_tensors(config, dtype, kind)
    total_bytes = sum(stored.nbytes for stored in plan.values())
    name = str(dtype).removeprefix("torch.")
    what = name if kind is None else f"{kind.name} ({name})"
    reporter.note(f"converting {source.ref.name} to {what}, {total_bytes / 1e9:.2f} GB → {folder}")
    artifacts.check_free_space(folder, total_bytes)

    digest = hashlib.sha256(f"{_canonical(config)} {what}".encode())
    with artifacts.atomic_dir(folder) as temporary, _unchanged(source, stamp):
        text = json.dumps(reader.config, indent=2)
        (temporary / "config.json").write_text(text, encoding="utf-8")
        reader.write_companions(temporary, reporter)
        complete_tokenizer(temporary, source.ref.name)
        eos_token_ids(temporary, config, source.ref.name)  # refused before the weights are read
        floats = FloatWeights(reader, config, dtype)
        manifest: dict[str, Any] = {
            "model": source.ref.name,
            "revision": source.revision,
            "source": source.fingerprint,
            "dtype": name,
            "own_dtype": str(reader.dtype).removeprefix("torch."),
            "reading": READING,
            "companions": COMPANIONS,
        }
        rounder, work_dir = None, temporary / "work"
        if rounding is not None:
            tokenizer = partial(load_tokenizer, temporary, source.ref.name)
            rounder, record = rounding.begin(floats, tokenizer, work_dir, reporter)
            manifest |= {"quantization": rounding.kind.name, "rounding": record}
        tensors = _tensors(floats, kind, rounder)
        sizes = {}
        with reporter.task("Converting", total_bytes, "B") as task:
            for shard, group in plan_shards(plan, SHARD_BYTES).items():
                path, own = temporary / shard, islice(tensors, len(group))
                write_shard(path, group, own, digest=digest, progress=task.advance)
                sizes[shard] = path.stat().st_size
        shutil.rmtree(work_dir, ignore_errors=True)
        manifest |= {"shards": sizes, "fingerprint": digest.hexdigest()}
        artifacts.write_manifest(temporary / MANIFEST, KIND, manifest)


@contextmanager
def _unchanged(source: Source, stamp: str) -> Iterator[None]:
    """Files that changed under the reader explain whatever it made of them, errors too.

    Raises:
        TealError: they no longer have the `stamp` that they had.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    try:
        changed = source.stamp != stamp
    except OSError:
        changed = True
    if changed:
        raise TealError(
            f"the files of {source.ref.name} changed while they were read",
            hint="Run the command again when nothing writes to them.",
        ) from failure
    if failure is not None:
        raise failure


_NEWER_ROPE = (
    *("truncate", "divisors", "partial_rotary_factor"),
    *("most_positions", "llama_4_scaling_beta"),
)


def _canonical(config: ModelConfig) -> str:
    """The config as text, the same for equal configs and for those of earlier versions."""
    fields = dataclasses.asdict(config)
    # What is newer than the fingerprints of many profiles counts only where it is used.
    for newer in dataclasses.fields(ModelConfig):
        if newer.default is not dataclasses.MISSING and fields[newer.name] == newer.default:
            del fields[newer.name]
    plain = dataclasses.asdict(RopeConfig(theta=config.rope.theta))
    for name in _NEWER_ROPE:
        if fields["rope"][name] == plain[name]:
            del fields["rope"][name]
    return json.dumps(fields, sort_keys=True)


def _tensors(
    floats: FloatWeights, kind: Quantization | None, rounder: Rounder | None
) -> Iterator[Tensor]:
    """What the files hold, in the order of `stored_tensors`."""
    for name in tensor_shapes(floats.config, kind):
        if kind is not None and rounder is not None and kind.quantizes(name):
            yield from tensors_of(rounder(name))
        else:
            yield floats(name)
