# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Kernels that draw the next token from what the selections left, and step on."""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.gpu.handover import _wait
from teal_kernels.gpu.radix import _descend, _keys

# Rows of counts that are remembered: a host that is a step behind may take back two.
ROWS = tl.constexpr(3)


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


@triton.jit
def penalise_kernel(
    penalised_ptr, logits_ptr, seen_ptr, penalty_ptr, V, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """penalised = logits [V], those of tokens seen over the penalty, or times it where negative.

    The repetition penalty of CTRL (arXiv 1909.05858, section 4.1), as transformers has it.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < V
    seen = tl.load(seen_ptr + offs, mask=mask, other=0)
    penalty = tl.load(penalty_ptr)
    _wait(PDL)
    logits = tl.load(logits_ptr + offs, mask=mask, other=0.0)
    changed = tl.where(logits < 0, logits * penalty, tl.div_rn(logits, penalty))
    tl.store(penalised_ptr + offs, tl.where(seen != 0, changed, logits), mask=mask)


@triton.jit(do_not_specialize=["levels"])
def best_kernel(
    best_ptr,
    index_ptr,
    logits_ptr,
    bins_ptr,
    state_ptr,
    peaks_ptr,
    temperature_ptr,
    floor_ptr,
    seed_ptr,
    position_ptr,
    V,
    programs,
    levels,
    CUT: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
    PEAKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program's best logit and its token; with a temperature, of logit / t + Gumbel noise.

    The largest of perturbed logits is a draw from their softmax (Gumbel 1954). With CUT only the
    tokens that the selections left take part, with MIN_P those that are no further than `floor`
    below the largest. A logit of NaN or infinity is the best there can be, and its token is -1.
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
    if MIN_P:
        offs_p = tl.arange(0, PEAKS)
        peaks = tl.load(peaks_ptr + offs_p, mask=offs_p < programs, other=float("-inf"))
        mask = mask & (logits - tl.max(peaks, axis=0) >= tl.load(floor_ptr))
    scores = tl.where(mask, scores, float("-inf"))
    best = tl.max(scores, axis=0)
    index = tl.min(tl.where(mask & (scores == best), offs, V), axis=0)
    broken = tl.max((~(logits < float("inf"))).to(tl.int32), axis=0) > 0
    tl.store(best_ptr + tl.program_id(0), tl.where(broken, float("inf"), best))
    tl.store(index_ptr + tl.program_id(0), tl.where(broken, -1, index))


@triton.jit
def advance_kernel(
    token_ptr,
    position_ptr,
    history_ptr,
    shift_ptr,
    kept_ptr,
    kept_before_ptr,
    seen_ptr,
    best_ptr,
    index_ptr,
    programs,
    kept_size,
    PENALTY: tl.constexpr,
    PROGRAMS: tl.constexpr,
    KEPT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Take the best of all programs' bests as the next token and step one position on.

    The host is told -1 where there is none; what runs ahead of it goes on with token 0. What the
    counts stand at is noted too, in rows by turns, and with PENALTY that the token was seen. The
    row is that of the position as the host has it, which may be further on.
    """
    offs = tl.arange(0, PROGRAMS)
    mask = offs < programs
    position = tl.load(position_ptr)
    _wait(PDL)
    values = tl.load(best_ptr + offs, mask=mask, other=float("-inf"))
    indices = tl.load(index_ptr + offs, mask=mask, other=2147483647)
    best = tl.max(values, axis=0)
    token = tl.min(tl.where(mask & (values == best), indices, 2147483647), axis=0)
    token = tl.where(best > float("-inf"), token, -1)
    tl.store(history_ptr + position, token)
    token = tl.maximum(token, 0)
    tl.store(token_ptr, token)
    tl.store(position_ptr, position + 1)
    if PENALTY:
        tl.store(seen_ptr + token, 1)
    offs_k = tl.arange(0, KEPT)
    kept = tl.load(kept_ptr + offs_k, mask=offs_k < kept_size, other=0)
    row = kept_before_ptr + ((position + tl.load(shift_ptr)) % ROWS) * kept_size
    tl.store(row + offs_k, kept, mask=offs_k < kept_size)


# It is compiled once, for any number of guesses at any position.
@triton.jit(
    do_not_specialize=["first", "guesses", "assumed"],
    do_not_specialize_on_alignment=["guesses_ptr", "choices_ptr"],
)
def follow_kernel(
    token_ptr,
    position_ptr,
    shift_ptr,
    kept_ptr,
    kept_before_ptr,
    guesses_ptr,
    choices_ptr,
    first,
    guesses,
    assumed,
    vocab,
    kept_size,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Set the token chosen after the last guess that is right, and its position.

    choices[i] follows the token at first + i, and guess i says the same or is wrong. A bit of
    `assumed`, where it is not negative, says of a guess that it counts as right or does not. For
    the host the position is that behind all guesses.
    """
    _wait(PDL)
    offs = tl.arange(0, BLOCK)
    guess = tl.load(guesses_ptr + offs, mask=offs < guesses, other=0)
    choice = tl.load(choices_ptr + offs, mask=offs <= guesses, other=0)
    if assumed >= 0:
        other = tl.where(choice == guess, (choice + 1) % vocab, choice)
        counted = tl.where((assumed >> offs) & 1 > 0, guess, other)
        choice = tl.where(offs < guesses, counted, choice)
    wrong = (choice != guess) | (offs >= guesses)
    right = tl.min(tl.where(wrong, offs, BLOCK), axis=0)
    token = tl.sum(tl.where(offs == right, choice, 0), axis=0)
    tl.store(token_ptr, tl.maximum(token, 0))
    tl.store(position_ptr, first + right + 1)
    tl.store(shift_ptr, guesses - right)
    offs_k = tl.arange(0, KEPT)
    kept = tl.load(kept_ptr + offs_k, mask=offs_k < kept_size, other=0)
    row = kept_before_ptr + ((first + guesses) % ROWS) * kept_size
    tl.store(row + offs_k, kept, mask=offs_k < kept_size)
