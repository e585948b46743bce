# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Radix selection: the logit at which top-k or top-p cuts a vocabulary off.

A kernel a level sums up, by the next 8 bits of the logits, what each bin holds of the tokens that
share the cut's bits so far, and the next kernel goes down into the bin where the wanted amount is
reached. For top-k a token counts 1, for top-p its probability in fixed point, so that the order of
the sums is of no matter. Tokens that tie with the last one stay in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.gpu.handover import _wait

LEVELS = 4  # of 8 bits each, in a selection
BINS = 256


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
