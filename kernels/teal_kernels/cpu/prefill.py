"""Prefill on a CPU: several tokens at once through the decoder, dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_kernels.cpu import amx, binding, codes, integers, layers, product, team
from teal_kernels.cpu.attention import KEYS, QUERIES
from teal_kernels.cpu.compiled import decode
from teal_kernels.cpu.layers import CHUNK, Inputs, Room, Tokens
from teal_kernels.cpu.panels import BLOCK_BYTES
from teal_kernels.cpu.step import _compile, _team
from teal_kernels.cpu.structures import Model
from teal_kernels.cpu.tiles import COLUMNS, FEW, TOKENS
from teal_kernels.tensors import StepTensors


def is_compiled() -> bool:
    """Whether code of the step and of prefill is kept on disk; that it fits is not looked at."""
    functions = (decode, layers.run_layers, layers.answer)
    return not any(getattr(function._cache, "is_empty", True) for function in functions)


class Prefill:
    """A decoder bound to its weights and its cache, for several tokens at once, dense.

    Its threads are those of a `DecodeStep`; weights are read once for up to CHUNK tokens.
    """

    def __init__(
        self, tensors: StepTensors, *, threads: int | None = None, units: bool | None = None
    ) -> None:
        """Bind to tensors; compiles where nothing compiled is found on disk.

        Args:
            tensors: the decoder's, contiguous and on the CPU.
            threads: by default as many as torch uses, and no more than there are cores for us.
            units: multiply on AMX, by default where it can be used and weights are not float32.

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
        self._tokens = _tokens(model, units)
        self._rooms = [_room(model, units) for _ in range(count)]
        rows = np.empty((0, model.hidden), dtype=np.float32)
        logits = np.empty((0, model.vocab), dtype=np.float32)
        self._run_layers = _compile(layers.run_layers, self._layers_arguments(0, rows, 0, 0, 0))
        self._answer = _compile(layers.answer, self._answer_arguments(0, rows, rows, logits))

    def layers(self, hidden: Tensor, position: int, first: int, last: int) -> Tensor:
        """Take hidden [T, H] float32 through layers `first` to `last`, in place; cache T positions.

        Returns: `hidden`.

        Raises:
            ValueError: the positions are beyond the cache, or hidden is not contiguous float32.
        """
        if not 0 <= position <= self._model.length - len(hidden):
            raise ValueError(
                f"{len(hidden)} positions from {position} on are outside {self._model.length}"
            )
        rows = self._checked(hidden)
        self._run(
            lambda thread: self._run_layers(
                *self._layers_arguments(thread, rows, position, first, last)
            )
        )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """What the last layer gives, [T, H] float32 → logits [T, V] float32 after each token.

        Raises:
            ValueError: hidden is not contiguous float32.
        """
        rows = self._checked(hidden)
        normed = np.empty((_whole(len(rows), FEW), rows.shape[1]), dtype=np.float32)
        logits = np.empty((len(rows), self._model.vocab), dtype=np.float32)
        self._run(
            lambda thread: self._answer(*self._answer_arguments(thread, rows, normed, logits))
        )
        return torch.from_numpy(logits)

    def _checked(self, hidden: Tensor) -> Any:
        expected = (len(hidden), self._model.hidden)
        if tuple(hidden.shape) != expected or hidden.dtype != torch.float32:
            raise ValueError(f"hidden must be {expected} float32, got {tuple(hidden.shape)}")
        if not hidden.is_contiguous():
            raise ValueError("hidden must be contiguous")
        return hidden.numpy()

    def _run(self, work: Callable[[int], None]) -> None:
        team.run(work, len(self._teams), self._barrier)

    def _mate(self, thread: int) -> Any:
        mate = self._teams[thread]
        mate.phase[0] = 0
        return mate

    def _layers_arguments(
        self, thread: int, hidden: Any, position: int, first: int, last: int
    ) -> tuple[Any, ...]:
        return (
            self._mate(thread), self._model, self._tokens, self._rooms[thread],
            hidden, position, first, last,
        )  # fmt: skip

    def _answer_arguments(
        self, thread: int, hidden: Any, normed: Any, logits: Any
    ) -> tuple[Any, ...]:
        block = np.empty((FEW, layers.ROWS), dtype=np.float32)
        return self._mate(thread), self._model, hidden, normed, block, logits


def _tokens(model: Model, units: bool) -> Tokens:
    """Room for CHUNK tokens, or as many as the cache has positions."""
    count = min(CHUNK, model.length)

    rows = _whole(count, TOKENS)
    hidden, inner = max(model.hidden, model.heads * model.head_dim), model.inner
    size = 4 * _whole(count, 2 * amx.SIDE) * _whole(max(hidden, inner), codes.STEP)
    parts = np.zeros(size, dtype=np.uint8) if units else np.zeros(0, dtype=np.float32)
    scales = np.zeros(_whole(count, amx.SIDE), dtype=np.float32)

    def inputs(columns: int) -> Inputs:
        """Rows in whole steps, and some more so that they do not share sets of the cache."""
        values = np.zeros((rows, _whole(columns, codes.STEP) + 16), dtype=np.float32)
        return Inputs(values, parts, scales)

    return Tokens(
        inputs=inputs(hidden),
        inner=inputs(inner),
        qkv=np.empty((count, int(model.qkv.offsets[-1])), dtype=np.float32),
    )


def _room(model: Model, units: bool) -> Room:
    size = model.head_dim
    tokens = _whole(_whole(min(CHUNK, model.length), TOKENS), 2 * amx.SIDE)
    rows = _whole(QUERIES * model.heads // model.kv_heads, TOKENS)
    few = _whole(FEW, TOKENS) * (product.FEW_WIDTH + 64)
    sums = max(tokens * (product.WIDTH + 64), few)
    unpacked = max(BLOCK_BYTES, KEYS * _whole(size, COLUMNS) * 4)
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
        codes=np.empty(integers.CODES if units else 0, dtype=np.int8),
        products=np.empty(4 * amx.SIDE**2, dtype=np.int32),
        scaled=np.empty(integers.SCALED if units else 0, dtype=np.uint8),
        factors=np.empty(integers.FACTORS, dtype=np.int16),
        largest=np.empty(integers.GROUPS, dtype=np.float32),
        offsets=np.empty((tokens, COLUMNS + 16), dtype=np.float32),
    )


def _whole(size: int, tile: int) -> int:
    """`size`, rounded up to whole tiles."""
    return -(-size // tile) * tile
