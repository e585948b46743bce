# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""What one kernel of the step leaves to the next: the wait for it, and its sums.

Accumulators are float32, or int64 in fixed point, and added to by relaxed atomics; each is set to
the biases of what is added to it by an earlier kernel of the chain.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Deterministic accumulators are int64: sums of integers do not depend on their order. 36 bits are
# fraction, so that the residual stream may reach 6.7e7 and the error of a sum stays near 1e-11.
_FIXED_POINT = tl.constexpr(float(1 << 36))
_LARGEST = tl.constexpr(float(1 << 26))
# What cannot be held, infinity and NaN, sets the sum to this. Nothing that is added to it
# afterwards brings it back below a half of it in size, which is where sums are read as NaN.
_LOST = tl.constexpr((1 << 63) - 1)


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


# Under TRITON_INTERPRET=1 the decorator gives something else, which runs on CPU tensors.
INTERPRETED = not isinstance(_wait, triton.runtime.JITFunction)


@triton.jit
def _read(ptr, mask):
    """Sums as float32, from an accumulator of either kind."""
    value = tl.load(ptr, mask=mask, other=0)
    if value.dtype == tl.int64:
        value = value.to(tl.float32) * (1.0 / _FIXED_POINT)
        value = tl.where(tl.abs(value) < _LARGEST, value, float("nan"))
    return value


@triton.jit
def _fixed(ptr, value):
    """A float32 value as the accumulator behind ptr holds it."""
    if ptr.dtype.element_ty == tl.int64:
        held = tl.abs(value) < _LARGEST
        value = tl.where(held, (tl.where(held, value, 0.0) * _FIXED_POINT).to(tl.int64), _LOST)
    return value


@triton.jit
def _add(ptr, value, mask):
    """Add float32 values to the accumulators at ptr."""
    value = _fixed(ptr, value)
    if value.dtype == tl.int64:
        tl.atomic_max(ptr, value, mask=mask & (value == _LOST), sem="relaxed")
        mask = mask & (value != _LOST)
    tl.atomic_add(ptr, value, mask=mask, sem="relaxed")


@triton.jit
def _later_biases(later_bias_ptr, later_size, LATER: tl.constexpr):
    """This program's part of the biases from which a later kernel's sums start.

    To be loaded before the wait, so that nothing after it waits for them.
    """
    pid = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    offs = pid * LATER + tl.arange(0, LATER)
    return offs, tl.load(later_bias_ptr + offs, mask=offs < later_size, other=0.0)


@triton.jit
def _start_later(later_ptr, offs, biases, later_size):
    """Set this program's part of the accumulator that a later kernel adds to."""
    tl.store(later_ptr + offs, _fixed(later_ptr, biases), mask=offs < later_size)
