"""Histograms of abs(x) whose bins are the top bits of a float32: no range pass, mergeable.

A bin is an exponent and six bits of mantissa, so it is at most 1/64 as wide as its values are
large, wherever they lie. TEAL (arXiv 2408.14690, section 4.1) needs quantiles of abs(x) only.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MANTISSA_BITS = 6
_SHIFT = 23 - _MANTISSA_BITS
# 2^-24 is the smallest positive float16; 2^16 is just above the largest.
_MIN_EXPONENT, _MAX_EXPONENT = -24, 16
_FIRST = (127 + _MIN_EXPONENT) << _MANTISSA_BITS  # top bits of 2^_MIN_EXPONENT

# Bin 0 holds exact zeros, bin 1 what lies below 2^-24, the last also what lies above 2^16.
BINS = 2 + ((_MAX_EXPONENT - _MIN_EXPONENT) << _MANTISSA_BITS)


def count(x: Tensor) -> Tensor:
    """Counts of abs(x) by bin: any shape, finite floats → int64 [BINS] on the same device."""
    bits = x.abs().to(torch.float32).flatten().view(torch.int32)
    index = (bits >> _SHIFT).sub_(_FIRST - 2).clamp_(1, BINS - 1)
    index.mul_(bits != 0)
    return torch.bincount(index, minlength=BINS)


def upper_edges() -> Tensor:
    """The largest abs(x) of each bin, float64 [BINS]; a bin begins where the one before ends."""
    tops = torch.arange(_FIRST, _FIRST + BINS - 1, dtype=torch.int32) << _SHIFT
    return torch.cat([torch.zeros(1), tops.view(torch.float32)]).double()
