"""Rounding that makes up for its own error: GPTQ (arXiv 2210.17323) on rows with own grids.

The output error of a matrix W [K, N] rounded to V over inputs X [T, K] is |X (W - V)|^2. Input
channels are rounded one after another; what rounding one of them does to the outputs is taken back
by those that are still floats. In our layout a channel is a row whose groups along the outputs have
scales of their own, taken when its turn comes: no order of channels costs anything in decoding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from teal_kernels.quantized import (
    QuantizedMatrix,
    column_sizes,
    int4_codes,
    int4_grid,
    int4_rows,
)
from torch import Tensor

# Rows whose errors reach the later blocks in one product (section 3.2 of the paper, step 2).
_BLOCK = 128
_DAMPING = 0.01  # of the mean of the Hessian's diagonal (step 3)
# Grids to try for a group, in shares of its extremes: giving up the outermost weights costs less
# than wide steps do, 6 % of the output error on SmolLM2-135M.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


def gptq(weight: Tensor, hessian: Tensor, group: int) -> QuantizedMatrix:
    """Round a matrix to int4 (algorithm 1 of the paper).

    Args:
        weight: [K, N].
        hessian: X^T X of its inputs, [K, K] float32, times any constant.
        group: columns that share scale and offset.
    """
    # The largest inputs first, while there are many rows left to make up for them.
    order = hessian.diagonal().argsort(descending=True)
    columns = column_sizes(weight)
    left = weight[order] / columns
    factor = _factor(hessian[order[:, None], order])
    shrink = torch.tensor(_SHRINK, device=weight.device)[:, None]
    codes, scales, offsets = [], [], []
    for start in range(0, len(left), _BLOCK):
        block, upper = left[start : start + _BLOCK], factor[start : start + _BLOCK]
        within, beyond = upper[:, start : start + _BLOCK], upper[:, start + _BLOCK :]
        errors = torch.empty_like(block)
        for i in range(len(block)):
            row = block[i : i + 1]
            code, scale, offset = _nearest(row, shrink, group)
            errors[i] = (row - _values(code, scale, offset, group)) / within[i, i]
            block[i + 1 :].addr_(within[i, i + 1 :], errors[i], alpha=-1)
            codes.append(code)
            scales.append(scale)
            offsets.append(offset)
        left[start + _BLOCK :].addmm_(beyond.T, errors, alpha=-1)
    back = order.argsort()
    rows = int4_rows(torch.cat(codes)[back], torch.cat(scales)[back], torch.cat(offsets)[back])
    return QuantizedMatrix(rows, columns, weight.shape[1], group)


def _nearest(row: Tensor, shrink: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and offsets of a row [1, N] on the grids that leave the least square error.

    `shrink` [R, 1] holds the shares of a group's extremes to try.
    """
    scales, offsets = int4_grid(row * shrink, group)
    codes = int4_codes(row.expand(len(shrink), -1), scales, offsets, group)
    error = (_values(codes, scales, offsets, group) - row).square()
    groups = F.pad(error, (0, -row.shape[1] % group)).unflatten(1, (-1, group))
    best = groups.sum(2).argmin(0, keepdim=True)  # of each group
    columns = best.repeat_interleave(group, 1)[:, : row.shape[1]]
    return codes.gather(0, columns), scales.gather(0, best), offsets.gather(0, best)


def _values(codes: Tensor, scales: Tensor, offsets: Tensor, group: int) -> Tensor:
    """What codes [R, N] stand for, float32."""
    step, low = (t.float().repeat_interleave(group, 1) for t in (scales, offsets))
    return codes * step[:, : codes.shape[1]] + low[:, : codes.shape[1]]


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
