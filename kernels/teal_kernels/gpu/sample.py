# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Choosing the next token on the device, so that no step waits for the host.

Top-k and top-p each leave the tokens whose logits reach a cut. It is found by radix selection: a
kernel a level sums up, by the next 8 bits of the logits, what each bin holds of the tokens that
share the cut's bits so far, and the next kernel goes down into the bin where the wanted amount is
reached. For top-k a token counts 1, for top-p its probability in fixed point, so that the order of
the sums is of no matter. Tokens that tie with the last one stay in.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from teal_kernels.gpu.decode import _wait

_BLOCK = 256  # logits a program
_LEVELS = 4  # of 8 bits each, in a selection
_BINS = 256

# A division by less would turn logits into infinity; by this it is greedy but for exact ties.
_LEAST_TEMPERATURE = 1e-30


@triton.jit
def _keys(logits):
    """Logits float32 → int64 from 0 to 2^32 - 1, in the same order."""
    bits = logits.to(tl.uint32, bitcast=True)
    mask = (0 - (bits >> 31)) | 0x80000000  # a negative number's bits run the other way
    return (bits ^ mask).to(tl.int64)


@triton.jit
def _descend(bins_ptr, prefix, rest):
    """The cut's bits with those of the bin where `rest`, from above, is reached, and its part."""
    offs = tl.arange(0, 256)
    amounts = tl.load(bins_ptr + offs)
    reached = tl.cumsum(amounts, axis=0, reverse=True) >= rest
    last = tl.maximum(tl.sum(reached.to(tl.int64), axis=0) - 1, 0)
    above = tl.sum(tl.where(offs > last, amounts, 0), axis=0)
    return prefix * 256 + last, rest - above


@triton.jit
def _add_up(bins_ptr, digits, member, amounts, BY_MASS: tl.constexpr):
    """Add amounts [BLOCK] int64 to bins [256], by digit, where `member` says so.

    The product of a one-hot matrix of the digits' upper halves, weighted, with one of their lower
    halves. Float16 holds integers up to 2048 exactly and float32 their sums, so an amount of up
    to 2^33 goes in three parts.
    """
    offs = tl.arange(0, 16)
    upper = ((digits >> 4)[None, :] == offs[:, None]) & member[None, :]
    lower = ((digits & 15)[:, None] == offs[None, :]).to(tl.float16)
    if BY_MASS:
        total = tl.zeros((16, 16), tl.int64)
        for i in tl.static_range(3):
            part = (amounts >> (22 - 11 * i)) & (4095 if i == 0 else 2047)
            weighted = tl.where(upper, part[None, :], 0).to(tl.float16)
            total = total * 2048 + tl.dot(weighted, lower).to(tl.int64)
    else:
        total = tl.dot(upper.to(tl.float16), lower).to(tl.int64)
    bins = bins_ptr + offs[:, None] * 16 + offs[None, :]
    tl.atomic_add(bins, total, mask=total != 0, sem="relaxed")


@triton.jit
def peak_kernel(
    peaks_ptr,
    bins_ptr,
    logits_ptr,
    V,
    bins_size,
    CLEARED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program's largest logit; clears the bins of the selections to come."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cleared = tl.program_id(0) * CLEARED + tl.arange(0, CLEARED)
    _wait(PDL)
    logits = tl.load(logits_ptr + offs, mask=offs < V, other=float("-inf"))
    tl.store(peaks_ptr + tl.program_id(0), tl.max(logits, axis=0))
    tl.store(bins_ptr + cleared, tl.zeros((CLEARED,), tl.int64), mask=cleared < bins_size)


@triton.jit(do_not_specialize=["level", "digit"])
def select_kernel(
    bins_ptr,
    state_ptr,
    logits_ptr,
    peaks_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    V,
    programs,
    level,
    digit,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    PEAKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One level of a selection: the bins [level, 256] int64 by the next 8 bits of the cut.

    state [level] holds the cut's bits so far, and what the tokens that share them are to hold.
    Digit 0 begins a selection; where another went before it, of the tokens that that one left.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < V
    logits = tl.load(logits_ptr + offs, mask=mask, other=float("-inf"))
    keys = _keys(logits)
    temperature = tl.load(temperature_ptr)
    _wait(PDL)
    before = level - 1
    prefix = tl.full((), 0, tl.int64)
    rest = tl.load(top_k_ptr)
    if level > 0:
        prefix = tl.load(state_ptr + 2 * before)
        rest = tl.load(state_ptr + 2 * before + 1)
        if BY_MASS:  # noqa: SIM102 - known when it is compiled, unlike the other
            if digit == 1:
                total = tl.sum(tl.load(bins_ptr + before * 256 + tl.arange(0, 256)), axis=0)
                rest = tl.ceil(total.to(tl.float64) * tl.load(top_p_ptr)).to(tl.int64)
        prefix, rest = _descend(bins_ptr + before * 256, prefix, rest)
    member = mask
    if digit == 0:
        member = member & (keys >= prefix)
        prefix = prefix * 0
    shift = (24 - 8 * digit).to(tl.int64)
    member = member & ((keys >> (shift + 8)) == prefix)
    if tl.program_id(0) == 0:
        tl.store(state_ptr + 2 * level, prefix)
        tl.store(state_ptr + 2 * level + 1, rest)
    if tl.max(member.to(tl.int32), axis=0) > 0:  # few programs have any beyond the second level
        amounts = keys
        if BY_MASS:
            offs_p = tl.arange(0, PEAKS)
            peaks = tl.load(peaks_ptr + offs_p, mask=offs_p < programs, other=float("-inf"))
            mass = tl.exp((logits - tl.max(peaks, axis=0)) / temperature)
            amounts = (mass * 8589934592.0 + 0.5).to(tl.int64)  # 2^33
        _add_up(bins_ptr + level * 256, (keys >> shift) & 255, member, amounts, BY_MASS)


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
        self.bins = buffer(2 * _LEVELS, _BINS, dtype=torch.int64)
        self.state = buffer(2 * _LEVELS, 2, dtype=torch.int64)
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
        if any(choice):
            self._launch_peak()
        level = 0
        for wanted, by_mass in zip(choice, (False, True), strict=True):
            for digit in range(_LEVELS if wanted else 0):
                self._launch_select(level, digit, by_mass)
                level += 1
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
            level,
            CUT=level > 0,
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
