# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Choosing the next token on the device, so that no step waits for the host.

Top-k and top-p each leave the tokens whose logits reach a cut; the largest of what is left, with
Gumbel noise added, is the choice.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal_kernels.gpu.handover import _wait
from teal_kernels.gpu.radix import BINS, LEVELS, _descend, _keys, peak_kernel, select_kernel

_BLOCK = 256  # logits a program

# A division by less would turn logits into infinity; by this it is greedy but for exact ties.
_LEAST_TEMPERATURE = 1e-30


@triton.jit
def _noise(seed, position, offs):
    """Gumbel noise, a function of seed, position and token.

    -log of an exponential variate -log(1 - u). Float32 is finest where u is near 0, whence the
    largest noise comes: there log(1 - u) is a power series.
    """
    zero = offs * 0
    bits, _, _, _ = tl.philox(seed, offs, zero + position, zero, zero)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0)))
    return -tl.log(tl.where(u < 0.001, series, -tl.log(1.0 - tl.minimum(u, 0.9999999))))


@triton.jit(do_not_specialize=["levels"])
def best_kernel(
    best_ptr,
    index_ptr,
    logits_ptr,
    bins_ptr,
    state_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    V,
    levels,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program's best logit and its token; with a temperature, of logit / t + Gumbel noise.

    The largest of perturbed logits is a draw from their softmax (Gumbel 1954). With CUT only the
    tokens that the selections left take part.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < V
    temperature = tl.load(temperature_ptr)
    position = tl.load(position_ptr)
    noise = tl.zeros((BLOCK,), tl.float32)
    if temperature > 0:
        noise = _noise(tl.load(seed_ptr), position, offs)
    _wait(PDL)
    logits = tl.load(logits_ptr + offs, mask=mask, other=float("-inf"))
    scores = logits
    if temperature > 0:
        scores = logits / temperature + noise
    if CUT:
        prefix = tl.load(state_ptr + 2 * levels - 2)
        rest = tl.load(state_ptr + 2 * levels - 1)
        cut, _ = _descend(bins_ptr + (levels - 1) * 256, prefix, rest)
        mask = mask & (_keys(logits) >= cut)
    scores = tl.where(mask, scores, float("-inf"))
    best = tl.max(scores, axis=0)
    tl.store(best_ptr + tl.program_id(0), best)
    index = tl.min(tl.where(mask & (scores == best), offs, V), axis=0)
    tl.store(index_ptr + tl.program_id(0), index)


@triton.jit
def advance_kernel(
    token_ptr,
    position_ptr,
    history_ptr,
    kept_ptr,
    kept_before_ptr,
    best_ptr,
    index_ptr,
    V,
    programs,
    kept_size,
    PROGRAMS: tl.constexpr,
    KEPT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Take the best of all programs' bests as the next token and step one position on.

    What the counts stand at is noted too, in one of two rows by turns.
    """
    offs = tl.arange(0, PROGRAMS)
    mask = offs < programs
    position = tl.load(position_ptr)
    _wait(PDL)
    values = tl.load(best_ptr + offs, mask=mask, other=float("-inf"))
    indices = tl.load(index_ptr + offs, mask=mask, other=2147483647)
    best = tl.max(values, axis=0)
    token = tl.min(tl.where(mask & (values == best), indices, 2147483647), axis=0)
    token = tl.minimum(token, V - 1)  # logits that are not a number compare with nothing
    tl.store(token_ptr, token)
    tl.store(history_ptr + position, token)
    tl.store(position_ptr, position + 1)
    offs_k = tl.arange(0, KEPT)
    kept = tl.load(kept_ptr + offs_k, mask=offs_k < kept_size, other=0)
    row = kept_before_ptr + (position % 2) * kept_size
    tl.store(row + offs_k, kept, mask=offs_k < kept_size)


class Choice(NamedTuple):
    """Which selections a step launches; how strict they are lies in device buffers."""

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
        self.vocab = logits.numel()
        self.block = max(16, min(_BLOCK, triton.next_power_of_2(self.vocab)))
        self.programs = triton.cdiv(self.vocab, self.block)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=logits.device)

        self.temperature, self.seed = buffer(1), buffer(1, dtype=torch.int64)
        self.top_k, self.top_p = buffer(1, dtype=torch.int64), buffer(1, dtype=torch.float64)
        self.peaks = buffer(self.programs)
        self.bins = buffer(2 * LEVELS, BINS, dtype=torch.int64)
        self.state = buffer(2 * LEVELS, 2, dtype=torch.int64)
        self.best, self.index = buffer(self.programs), buffer(self.programs, dtype=torch.int32)
        self.kept_before = buffer(2, *kept.shape, dtype=kept.dtype)
        # In the host's memory, where the kernel writes it: the host waits for an event, not a copy.
        self.history = torch.zeros(
            length, dtype=torch.int32, pin_memory=logits.device.type == "cuda"
        )

    def set(self, temperature: float, top_k: int, top_p: float, seed: int) -> Choice:
        """Choose by these from the next launch on; the kernels that it takes.

        Args:
            temperature: 0 is greedy.
            top_k: how many tokens stay; 0 is all.
            top_p: the smallest set of those that top-k left which reaches this share of their
                probability stays; 1 is all.
            seed: of the noise; from -2^63 to 2^63 - 1.
        """
        greedy = temperature == 0 or top_k == 1
        self.temperature.fill_(0.0 if greedy else max(temperature, _LEAST_TEMPERATURE))
        self.top_k.fill_(min(top_k, self.vocab))
        self.top_p.fill_(top_p)
        self.seed.fill_(seed)
        return Choice(not greedy and 0 < top_k < self.vocab, not greedy and top_p < 1)

    def launch(self, choice: Choice) -> None:
        """Launch the kernels of one choice."""
        self.select(choice)
        self.draw(choice)

    def select(self, choice: Choice) -> None:
        """Find the cut of top-k, and then that of top-p."""
        if any(choice):
            self._launch_peak()
        level = 0
        for wanted, by_mass in zip(choice, (False, True), strict=True):
            for digit in range(LEVELS if wanted else 0):
                self._launch_select(level, digit, by_mass)
                level += 1

    def draw(self, choice: Choice) -> None:
        """Draw from what `select` left, and step on."""
        self._launch(
            best_kernel,
            (self.programs,),
            4,
            self.best,
            self.index,
            self.logits,
            self.bins,
            self.state,
            self.temperature,
            self.seed,
            self.position,
            self.vocab,
            LEVELS * sum(choice),
            CUT=any(choice),
            BLOCK=self.block,
        )
        self._launch_advance()

    def _launch_peak(self) -> None:
        self._launch(
            peak_kernel,
            (self.programs,),
            4,
            self.peaks,
            self.bins,
            self.logits,
            self.vocab,
            self.bins.numel(),
            CLEARED=triton.next_power_of_2(triton.cdiv(self.bins.numel(), self.programs)),
            BLOCK=self.block,
        )

    def _launch_select(self, level: int, digit: int, by_mass: bool) -> None:
        self._launch(
            select_kernel,
            (self.programs,),
            4,
            self.bins,
            self.state,
            self.logits,
            self.peaks,
            self.temperature,
            self.top_k,
            self.top_p,
            self.vocab,
            self.programs,
            level,
            digit,
            BY_MASS=by_mass,
            maxnreg=128,  # so that a vocabulary of 128 256 takes one wave of an H100
            BLOCK=self.block,
            PEAKS=triton.next_power_of_2(self.programs),
        )

    def _launch_advance(self) -> None:
        self._launch(
            advance_kernel,
            (1,),
            4,
            self.token,
            self.position,
            self.history,
            self.kept,
            self.kept_before,
            self.best,
            self.index,
            self.vocab,
            self.programs,
            self.kept.numel(),
            PROGRAMS=triton.next_power_of_2(self.programs),
            KEPT=triton.next_power_of_2(self.kept.numel()),
        )
