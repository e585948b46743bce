# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Choosing the next token on the device, so that no step waits for the host."""

from __future__ import annotations

import triton
import triton.language as tl

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
