"""Decoding on a CPU: one compiled call a token and thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from teal_kernels.cpu import binding, compiled, team
from teal_kernels.cpu.code_cache import check_cpu
from teal_kernels.cpu.structures import Shared, Team
from teal_kernels.quantized import QuantizedMatrix
from teal_kernels.tensors import PROJECTIONS, RecoveryVectors, StepTensors

# Of the seven projections, those of whose input a thread lists only the channels it computed.
_OWN_CHANNELS = np.array([False, False, False, True, False, False, True])


class DecodeStep:
    """A decoder bound to its weights and its cache; a call decodes one token.

    The threads run one compiled function together and meet at a barrier after each part of a
    layer; none of torch's or numba's own parallel loops is involved.
    """

    def __init__(self, tensors: StepTensors, *, threads: int | None = None) -> None:
        """Bind the step to tensors.

        Compiles the step where no compiled one is found on disk: some seconds, once a dtype.

        Args:
            tensors: the decoder's, contiguous and on the CPU.
            threads: by default as many as torch uses, and no more than there are cores for us.

        Raises:
            ValueError: the tensors are not contiguous, on a CPU, and, but for the quantized, of one
                dtype that is known; a matrix is stored in different ways in different layers.
        """
        binding.check(tensors)
        self._tensors = tensors  # the model holds no more than their addresses
        self._vectors = tensors.vectors()
        self._model = binding.model_of(tensors, self._vectors)
        shape = (len(tensors.layers), PROJECTIONS)
        self._thresholds = np.full(shape, -np.inf, dtype=np.float32)
        count = threads or team.default_threads()
        self._kept = np.zeros((count, *shape), dtype=np.int64)
        self._shared = binding.shared_of(self._model, count)
        self._barrier = torch.zeros(16, dtype=torch.int64)  # a cache line of its own
        self._teams = [_team(thread, count, self._barrier) for thread in range(count)]
        self._scratch = [binding.scratch_of(self._model) for _ in range(count)]
        self._decode = _compile(compiled.decode, self._arguments(0, self._shared, 0, 0))

    @property
    def threads(self) -> int:
        """Threads that decode together."""
        return len(self._teams)

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        """Keep what exceeds thresholds [layers, 7] float32; None keeps everything."""
        self._thresholds[:] = -np.inf if thresholds is None else thresholds.cpu().numpy()

    def set_vectors(self, vectors: RecoveryVectors | None) -> None:
        """Add these biases from now on and use these norms; None is the model's own."""
        self._vectors = self._tensors.vectors(vectors)
        self._model = self._model._replace(
            vectors=binding.vectors_of(self._tensors, self._vectors),
            norm=self._vectors.norm.data_ptr(),
        )

    @property
    def kept(self) -> Tensor:
        """Channels kept since the counts were cleared, [layers, 7] int64."""
        # Every thread lists the survivors of qkv and gate_up, but of o and down its own.
        return torch.from_numpy(np.where(_OWN_CHANNELS, self._kept.sum(0), self._kept[0]))

    def clear_counts(self) -> None:
        """Start counting anew."""
        self._kept[:] = 0

    def __call__(self, token: int, position: int) -> Tensor:
        """Decode `token` at `position` and cache its keys and values; float32 [vocab_size].

        Raises:
            ValueError: the token or the position is out of range.
        """
        vocab, length = self._model.vocab, self._model.length
        if not 0 <= token < vocab or not 0 <= position < length:
            raise ValueError(
                f"token {token} at position {position} is outside {vocab} tokens "
                f"or {length} positions"
            )
        # After a token's weights nothing is left in the cache: what is done here is kept short.
        before, logits = self._kept.copy(), np.empty(vocab, dtype=np.float32)
        shared = self._shared._replace(logits=logits)
        try:
            team.run(
                lambda thread: self._decode(*self._arguments(thread, shared, token, position)),
                self.threads,
                self._barrier,
            )
        except BaseException:
            self._kept[:] = before
            raise
        return torch.from_numpy(logits)

    def _arguments(self, thread: int, shared: Shared, token: int, position: int) -> tuple[Any, ...]:
        """What `compiled.decode` takes on one thread."""
        mate = self._teams[thread]
        mate.phase[0] = 0
        return (
            mate, self._model, shared, self._scratch[thread], token, position,
            self._thresholds, self._kept[thread],
        )  # fmt: skip


class Projection:
    """A matrix of every layer on its own, multiplied as a step does: to be measured and tested."""

    def __init__(self, weights: Sequence[Tensor | QuantizedMatrix], widths: Sequence[int]) -> None:
        """Bind to weights [K, N], one a layer, contiguous and on the CPU.

        Args:
            weights: alike in all layers.
            widths: columns of the P projections that stand side by side in them.
        """
        self._weights = weights  # the matrix holds no more than their addresses
        self._matrix = binding.matrix_of(weights, widths)
        inputs, outputs = weights[0].shape
        count = team.default_threads()
        self._barrier = torch.zeros(16, dtype=torch.int64)
        self._teams = [_team(thread, count, self._barrier) for thread in range(count)]
        self._scratch = [binding.survivors(inputs, [self._matrix]) for _ in range(count)]
        self._parts = np.empty((count, outputs), dtype=np.float32)
        self._kept = np.zeros((count, len(widths)), dtype=np.int64)
        nothing = np.empty((0, inputs), np.float32), np.empty(len(widths), np.float32)
        arguments = self._arguments(0, 0, *nothing, np.empty((0, outputs), np.float32))
        self._project = _compile(compiled.project, arguments)

    def __call__(self, layer: int, x: Tensor, thresholds: Tensor) -> Tensor:
        """`reference.sparse_project` with a layer's weights, of each x [..., K] on its own.

        x and thresholds [P] are float32, and so is the sum. With int4, products of x and a scale
        are rounded to 16 bits that eight channels share, an error of at most 2^-16 of the largest.
        """
        outputs = self._parts.shape[1]
        values = x.reshape(-1, x.shape[-1]).contiguous().numpy()
        levels = thresholds.contiguous().numpy()
        y = np.empty((len(values), outputs), dtype=np.float32)
        team.run(
            lambda thread: self._project(*self._arguments(thread, layer, values, levels, y)),
            len(self._teams),
            self._barrier,
        )
        return torch.from_numpy(y).view(*x.shape[:-1], outputs)

    def _arguments(
        self, thread: int, layer: int, x: Any, thresholds: Any, y: Any
    ) -> tuple[Any, ...]:
        """What `compiled.project` takes on one thread."""
        mate = self._teams[thread]
        mate.phase[0] = 0
        return (
            mate, self._matrix, layer, x, thresholds, self._parts, y,
            self._scratch[thread], self._kept[thread],
        )  # fmt: skip


def _team(thread: int, threads: int, barrier: Tensor) -> Team:
    phase = np.zeros(1, dtype=np.int64)
    waiting = team.syscall_address(), team.give_way_address()
    return Team(thread, threads, barrier.data_ptr(), phase, *waiting)


def _compile(function: Any, arguments: tuple[Any, ...]) -> Any:
    """The machine code of a compiled function for arguments of these types.

    Calling that costs 0.2 us; finding it anew for every call's named tuples, 50 us.
    """
    check_cpu()
    signature = tuple(numba.typeof(argument) for argument in arguments)
    function.compile(signature)
    return function.get_overload(signature)
