"""Rounding that makes up for its own error: GPTQ (arXiv 2210.17323) on rows with own grids.

The output error of a matrix W [K, N] rounded to V over inputs X [T, K] is |X (W - V)|^2. Input
channels are rounded one after another; what rounding one of them does to the outputs is taken back
by those that are still floats. In our layout a channel is a row whose groups along the outputs have
scales of their own, taken when its turn comes: no order of channels costs anything in decoding.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from teal_kernels.quantized import QuantizedMatrix, column_sizes, int4_rows
from torch import Tensor

# Rows whose errors reach the later blocks in one product (section 3.2 of the paper, step 2).
_BLOCK = 128
_DAMPING = 0.01  # of the mean of the Hessian's diagonal (step 3)
# Grids that a group starts from, in shares of its lowest and its highest weight, and how often each
# is then fitted to its codes and the codes to it. Of normal weights in groups of 64 the square
# error is 1.3 % above that of 400 starts and 8 fits; without fits it is 11 % above, and 13 % with
# six starts that shrink both ends alike.
_STARTS = tuple(itertools.product((1.0, 0.9, 0.8), repeat=2))
_FITS = 4
_LARGEST = 8192.0  # that a weight may be in units of its column, well within float16


def gptq(weight: Tensor, hessian: Tensor, group: int) -> QuantizedMatrix:
    """Round a matrix to int4 (algorithm 1 of the paper).

    Args:
        weight: [K, N].
        hessian: X^T X of its inputs, [K, K] float32, times any constant.
        group: columns that share scale and offset.
    """
    outputs = weight.shape[1]
    # The largest inputs first, while there are many rows left to make up for them.
    order = hessian.diagonal().argsort(descending=True)
    factor = _factor(hessian[order[:, None], order])
    sizes = column_sizes(weight)
    even = weight[order] / _divisor(sizes)
    # A row's error weighs as much as its inputs that no later row can make up for.
    spread = column_sizes(even / factor.diagonal()[:, None])
    spread /= _divisor(spread.mean())
    spread = torch.maximum(spread, even.abs().amax(0) / _LARGEST)
    columns = sizes * spread
    # The last group is filled up with its own last column, which then counts for nothing.
    short = (0, -outputs % group)
    left = F.pad(even / _divisor(spread), short, mode="replicate")
    importance = F.pad(columns, short).view(-1, group)
    # Only shares within a group count, and their squares stay in the range of float32.
    importance = (importance / _divisor(importance.amax(1, keepdim=True))).square()
    total = _divisor(importance.sum(1, keepdim=True))
    starts = torch.tensor(_STARTS, device=weight.device)
    codes, steps, offsets = [], [], []
    for start in range(0, len(left), _BLOCK):
        block, upper = left[start : start + _BLOCK], factor[start : start + _BLOCK]
        within, beyond = upper[:, start : start + _BLOCK], upper[:, start + _BLOCK :]
        errors = torch.empty_like(block)
        for i, row in enumerate(block):
            code, step, offset = _nearest(row.view(-1, group), importance, total, starts)
            errors[i] = (row - torch.addcmul(offset, code, step).flatten()) / within[i, i]
            block[i + 1 :].addr_(within[i, i + 1 :], errors[i], alpha=-1)
            codes.append(code.flatten()[:outputs].to(torch.uint8))
            steps.append(step[:, 0].half())
            offsets.append(offset[:, 0].half())
        left[start + _BLOCK :].addmm_(beyond.T, errors, alpha=-1)
    back = order.argsort()
    grids = (torch.stack(part)[back] for part in (codes, steps, offsets))
    return QuantizedMatrix(int4_rows(*grids), columns, outputs, group)


def _nearest(
    row: Tensor, importance: Tensor, total: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a row [G, group], and the scales and offsets [G, 1] that leave the least error.

    All are float32, and scales and offsets float16 numbers. The error is the sum of squares times
    `importance` [G, group], which sums to `total` [G, 1]. `starts` [R, 2] holds shares of a group's
    extremes.
    """
    low, high = row.aminmax(dim=1, keepdim=True)
    offsets = _rounded(low * starts[:, :1, None])  # [R, G, 1], as all grids are
    steps = _rounded((high * starts[:, 1:, None] - offsets) / 15)
    mean = (importance * row).sum(1, keepdim=True) / total
    for _ in range(_FITS):
        # The least squares line through the weights over their codes.
        codes = _codes(row, steps, offsets)
        middle = (importance * codes).sum(2, keepdim=True) / total
        apart = codes - middle
        weighed = importance * apart
        variance = (weighed * apart).sum(2, keepdim=True)
        slope = (weighed * row).sum(2, keepdim=True) / variance
        steps = _rounded(torch.where(variance > 0, slope, steps))
        offsets = _rounded(mean - steps * middle)
    codes = _codes(row, steps, offsets)
    error = importance * (torch.addcmul(offsets, codes, steps) - row).square()
    best = error.sum(2, keepdim=True).argmin(0, keepdim=True)
    codes = codes.gather(0, best.expand(-1, -1, row.shape[1]))[0]
    return codes, steps.gather(0, best)[0], offsets.gather(0, best)[0]


def _codes(row: Tensor, steps: Tensor, offsets: Tensor) -> Tensor:
    """The nearest codes on grids [R, G, 1], as float32 [R, G, group]."""
    return ((row - offsets) / _divisor(steps)).round_().clamp_(0, 15)


def _divisor(sizes: Tensor) -> Tensor:
    """Sizes to divide by: what has none is 0 itself, and stays it."""
    return torch.where(sizes > 0, sizes, 1)


def _rounded(grid: Tensor) -> Tensor:
    """To the nearest float16 number."""
    return grid.half().float()


def _factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, damped until there is one."""
    diagonal, damping = hessian.diagonal(), _DAMPING
    mean = diagonal.mean().clamp_min(1e-12)
    diagonal[diagonal == 0] = mean  # a channel that is always 0 shares its error with no other
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
        damping *= 10
