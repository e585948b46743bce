"""Prefill on a CPU: several tokens at once through the decoder, dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from teal_kernels.cpu import (
    amx,
    binding,
    codes,
    compiled,
    integers,
    passes,
    product,
    quads_few,
    team,
)
from teal_kernels.cpu.attention import KEYS, QUERIES
from teal_kernels.cpu.code_cache import CodeCache
from teal_kernels.cpu.layers import CHUNK, Inputs, Room, Tokens
from teal_kernels.cpu.panels import BLOCK_BYTES
from teal_kernels.cpu.step import _compile, _team
from teal_kernels.cpu.structures import Model
from teal_kernels.cpu.tiles import COLUMNS, FEW, TOKENS
from teal_kernels.tensors import StepTensors


def is_compiled(tensors: StepTensors) -> bool:
    """Whether the code of a step and of prefill is kept on disk, for tensors of these dtypes."""
    model = binding.model_of(tensors, tensors.vectors())
    return all(_is_kept(made, model) for made in (compiled.decode, passes.read_many))


def _is_kept(made: Any, model: Model) -> bool:
    return isinstance(made._cache, CodeCache) and made._cache.holds(numba.typeof(model))


class Prefill:
    """A decoder bound to its weights and its cache, for several tokens at once, dense.

    Its threads are those of a `DecodeStep`; weights are read once for up to CHUNK tokens.
    """

    def __init__(
        self,
        tensors: StepTensors,
        *,
        threads: int | None = None,
        units: bool | None = None,
        compiling: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Bind to tensors; compiles where nothing compiled is found on disk.

        Args:
            tensors: the decoder's, contiguous and on the CPU.
            threads: by default as many as torch uses, and no more than there are cores for us.
            units: multiply on AMX, by default where it can be used and weights are not float32.
            compiling: what surrounds the compilation of what only drafts need, when it is needed
                and not found on disk.

        Raises:
            ValueError: as `DecodeStep` does, and for `units` that cannot be used.
        """
        binding.check(tensors)
        self._tensors = tensors  # the model holds no more than their addresses
        self._vectors = tensors.vectors()  # nor does it hold these
        self._model = model = binding.model_of(tensors, self._vectors)
        count = threads or team.default_threads()
        self._barrier = torch.zeros(16, dtype=torch.int64)  # a cache line of its own
        self._teams = [_team(thread, count, self._barrier) for thread in range(count)]
        able = tensors.embed_tokens.dtype != torch.float32 and amx.usable()
        if units and not able:
            raise ValueError("AMX cannot be used here")
        units = able if units is None else units
        self._tokens = _tokens(model, units, count)
        self._rooms = [_room(model, units) for _ in range(count)]
        sizes = model.hidden, model.vocab
        rows, logits = (np.empty((0, size), dtype=np.float32) for size in sizes)
        self._no_ids = np.empty(0, dtype=np.int64)
        self._nothing = self._arguments(0, self._no_ids, rows, 0, 0, 0, logits)
        self._compiling = compiling
        self._read_many = _compile(passes.read_many, self._nothing)

    @cached_property
    def _read_few(self) -> Any:
        kept = _is_kept(passes.read_few, self._model)
        with nullcontext() if kept else self._compiling():
            return _compile(passes.read_few, self._nothing)

    def layers(self, hidden: Tensor, position: int, first: int, last: int) -> Tensor:
        """Take hidden [T, H] float32 through layers `first` to `last`, in place; cache T positions.

        Returns: `hidden`.

        Raises:
            ValueError: the positions are beyond the cache, or hidden is not contiguous float32.
        """
        read = self._read_many
        self._run(read, self._no_ids, self._checked(hidden), position, first, last, logits=False)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """What the last layer gives, [T, H] float32 → logits [T, V] float32 after each token.

        Raises:
            ValueError: hidden is not contiguous float32.
        """
        read = self._read_many
        return self._run(read, self._no_ids, self._checked(hidden), 0, 0, 0, logits=True)

    def read(self, tokens: Sequence[int], position: int) -> Tensor:
        """Read T tokens from a position on; logits [T, V] float32 after each.

        Up to FEW take less time than by `layers`, and are summed up in another order.

        Raises:
            ValueError: a token or a position is out of range.
        """
        ids, vocab = np.array(tokens, dtype=np.int64), self._model.vocab
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"tokens from {ids.min()} to {ids.max()} are outside {vocab}")
        hidden = np.empty((len(ids), self._model.hidden), dtype=np.float32)
        read = self._read_few if len(ids) <= FEW else self._read_many
        return self._run(read, ids, hidden, position, 0, len(self._tensors.layers), logits=True)

    def _run(
        self,
        function: Any,
        ids: Any,
        hidden: Any,
        position: int,
        first: int,
        last: int,
        *,
        logits: bool,
    ) -> Tensor:
        count, length = len(hidden), self._model.length
        if not 0 <= position <= length - count * (first < last):
            raise ValueError(f"{count} positions from {position} on are outside {length}")
        found = np.empty((count if logits else 0, self._model.vocab), dtype=np.float32)

        def read(thread: int) -> None:
            function(*self._arguments(thread, ids, hidden, position, first, last, found))

        team.run(read, len(self._teams), self._barrier)
        return torch.from_numpy(found)

    def _checked(self, hidden: Tensor) -> Any:
        expected = (len(hidden), self._model.hidden)
        if tuple(hidden.shape) != expected or hidden.dtype != torch.float32:
            raise ValueError(f"hidden must be {expected} float32, got {tuple(hidden.shape)}")
        if not hidden.is_contiguous():
            raise ValueError("hidden must be contiguous")
        return hidden.numpy()

    def _arguments(
        self, thread: int, ids: Any, hidden: Any, position: int, first: int, last: int, logits: Any
    ) -> tuple[Any, ...]:
        mate = self._teams[thread]
        mate.phase[0] = 0
        return (
            mate, self._model, self._tokens, self._rooms[thread],
            ids, hidden, position, first, last, logits,
        )  # fmt: skip


def _tokens(model: Model, units: bool, threads: int) -> Tokens:
    """Room for CHUNK tokens, or as many as the cache has positions."""
    count = min(CHUNK, model.length)
    rows = _whole(max(count, FEW), TOKENS)
    hidden, inner = max(model.hidden, model.heads * model.head_dim), model.inner
    parts, scales = _parts(model, units, _whole(count, 2 * amx.SIDE))

    def inputs(columns: int) -> Inputs:
        """Rows in whole steps, and some more so that they do not share sets of the cache."""
        values = np.zeros((rows, _whole(columns, codes.STEP) + 16), dtype=np.float32)
        return Inputs(values, parts, scales)

    def sums(columns: int) -> Any:
        """What each thread sums up for a few tokens."""
        shape = (threads, _whole(FEW, TOKENS), _whole(columns, codes.CHUNK) + codes.CHUNK + 16)
        return np.empty(shape, dtype=np.float32)

    qkv = int(model.qkv.offsets[-1])
    return Tokens(
        inputs=inputs(hidden),
        inner=inputs(inner),
        qkv=np.empty((count, qkv), dtype=np.float32),
        wide=sums(max(qkv, 2 * inner)),
        narrow=sums(model.hidden),
    )


def _parts(model: Model, units: bool, tokens: int) -> tuple[Any, Any]:
    """Room for what AMX multiplies, of any matrix, and scales of whole tiles of tokens."""
    most = max(model.hidden, model.heads * model.head_dim, model.inner)
    size = 4 * tokens * _whole(most, codes.STEP)
    parts = np.zeros(size, dtype=np.uint8) if units else np.zeros(0, dtype=np.float32)
    return parts, np.zeros(_whole(tokens, amx.SIDE), dtype=np.float32)


def _room(model: Model, units: bool) -> Room:
    size = model.head_dim
    tokens = _whole(_whole(min(CHUNK, model.length), TOKENS), 2 * amx.SIDE)
    rows = _whole(QUERIES * model.heads // model.kv_heads, TOKENS)
    sums = tokens, product.WIDTH + 64  # rows off each other's sets of the cache
    unpacked = max(BLOCK_BYTES, KEYS * _whole(size, COLUMNS) * 4)
    few = _whole(FEW, TOKENS)
    values = np.zeros((few, _whole(model.hidden, codes.STEP) + 16), dtype=np.float32)
    return Room(
        panels=np.zeros(unpacked // 4, dtype=np.float32),
        part=np.empty(sums, dtype=np.float32),
        up=np.empty(sums, dtype=np.float32),
        queries=np.zeros((rows, size + 16), dtype=np.float32),
        scores=np.zeros((rows, KEYS + 16), dtype=np.float32),
        sums=np.empty((rows, _whole(size, COLUMNS) + 16), dtype=np.float32),
        top=np.empty(rows, dtype=np.float32),
        total=np.empty(rows, dtype=np.float32),
        tiles=amx.configuration(),
        products=np.empty(4 * amx.SIDE**2, dtype=np.int32),
        scaled=np.empty(integers.SCALED if units else 0, dtype=np.uint8),
        **_numbers(model, units, tokens),
        hidden=np.empty((FEW, model.hidden), dtype=np.float32),
        normed=Inputs(values, *_parts(model, units, amx.SIDE)),
        quads=np.zeros((FEW, quads_few.INPUT_BYTES), dtype=np.uint8),
        logits=np.empty((FEW, passes.ROWS), dtype=np.float32),
    )


def _numbers(model: Model, units: bool, tokens: int) -> dict[str, Any]:
    """Room for a block's codes, and the numbers of its groups."""
    matrices = (model.qkv, model.o, model.gate_up, model.down)
    sizes = [integers.room_for(matrix.group, int(matrix.offsets[-1])) for matrix in matrices]
    span, groups, numbers = (max(size) if units else 0 for size in zip(*sizes, strict=True))
    return {
        "codes": np.empty(span, dtype=np.int8),
        "factors": np.empty(numbers, dtype=np.int16),
        "centres": np.empty(numbers, dtype=np.float32),
        "largest": np.empty(groups, dtype=np.float32),
        "each": np.empty(groups, dtype=np.float32),
        "offsets": np.empty(_whole(tokens, TOKENS) * groups, dtype=np.float32),
    }


def _whole(size: int, tile: int) -> int:
    """`size`, rounded up to whole tiles."""
    return -(-size // tile) * tile
