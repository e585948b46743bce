# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Choosing the next token on the device, so that no step waits for the host."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal_kernels.gpu.decode import _wait


@triton.jit
def best_kernel(
    best_ptr,
    index_ptr,
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program's best logit and its token; with a temperature, of logit / t + Gumbel noise.

    The largest of perturbed logits is a draw from their softmax (Gumbel 1954).
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < V
    temperature = tl.load(temperature_ptr)
    seed = tl.load(seed_ptr)
    position = tl.load(position_ptr)
    _wait(PDL)
    logits = tl.load(logits_ptr + offs, mask=mask, other=float("-inf"))
    if temperature > 0:
        uniform = tl.rand(seed + position, offs)
        noise = -tl.log(-tl.log(tl.maximum(uniform, 1e-10)))
        logits = logits / temperature + noise
        logits = tl.where(mask, logits, float("-inf"))
    best = tl.max(logits, axis=0)
    tl.store(best_ptr + tl.program_id(0), best)
    index = tl.min(tl.where(logits == best, offs, V), axis=0)
    tl.store(index_ptr + tl.program_id(0), index)


@triton.jit
def advance_kernel(
    token_ptr,
    position_ptr,
    history_ptr,
    best_ptr,
    index_ptr,
    COUNT,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Take the best of all programs' bests as the next token and step one position on."""
    offs = tl.arange(0, BLOCK)
    mask = offs < COUNT
    position = tl.load(position_ptr)
    _wait(PDL)
    values = tl.load(best_ptr + offs, mask=mask, other=float("-inf"))
    indices = tl.load(index_ptr + offs, mask=mask, other=2147483647)
    best = tl.max(values, axis=0)
    token = tl.min(tl.where(mask & (values == best), indices, 2147483647), axis=0)
    tl.store(token_ptr, token)
    tl.store(history_ptr + position, token)
    tl.store(position_ptr, position + 1)


_BLOCK = 4096  # logits a program


class Choice(NamedTuple):
    """Which restrictions a step's launches hold; how strict they are lies in device buffers."""

    top_k: bool = False
    top_p: bool = False


class _Launch(Protocol):
    def __call__(
        self, kernel: Any, grid: tuple[int, ...], num_warps: int, *args: Any, **constants: Any
    ) -> None: ...


class Chooser:
    """Chooses the token after a step's logits, and steps one position on."""

    def __init__(
        self,
        launch: _Launch,
        logits: Tensor,
        token: Tensor,
        position: Tensor,
        kept: Tensor,
        length: int,
    ) -> None:
        """Bind to a step's buffers.

        Args:
            launch: launches a kernel as the step's own are launched.
            logits: [vocab_size] float32, which it reads.
            token: [1] int32, which it sets.
            position: [1] int32, which it advances.
            kept: [layers, 7] int32, the step's counts of channels.
            length: positions of the cache.
        """
        self._launch = launch
        self.logits, self.token, self.position, self.kept = logits, token, position, kept
        programs = triton.cdiv(logits.numel(), _BLOCK)
        device = logits.device
        self.best = torch.zeros(programs, device=device)
        self.index = torch.zeros(programs, dtype=torch.int32, device=device)
        self.history = torch.zeros(length, dtype=torch.int32, device=device)
        self.temperature = torch.zeros(1, device=device)
        self.seed = torch.zeros(1, dtype=torch.int32, device=device)

    def launch(self, choice: Choice) -> None:
        """Launch the kernels of one choice."""
        vocab, count = self.logits.numel(), self.best.numel()
        self._launch(
            best_kernel,
            (count,),
            8,
            self.best,
            self.index,
            self.logits,
            self.temperature,
            self.seed,
            self.position,
            vocab,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
        )
        self._launch(
            advance_kernel,
            (1,),
            1,
            self.token,
            self.position,
            self.history,
            self.best,
            self.index,
            count,
            BLOCK=triton.next_power_of_2(count),
        )
