"""The specification of every op, in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from teal_kernels.checks import check_projection


def sparse_project(
    x: Tensor,
    weight: Tensor,
    offsets: tuple[int, ...],
    thresholds: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply the channels of x that exceed a threshold with the matrices that they feed.

    TEAL (arXiv 2408.14690, eq. 1 and section 4.4), with one threshold for each of P matrices that
    stand side by side: y[offsets[p]:offsets[p + 1]] = sum of x[i] * weight[i, ...] over the
    channels i with abs(x[i]) > thresholds[p].

    Args:
        x: [K] floating point.
        weight: [K, N] floating point; one input channel is one contiguous row.
        offsets: P + 1 column bounds, from 0 to N.
        thresholds: [P] float32, compared in float32; 0 drops only exact zeros, -inf nothing.
        bias: [N] floating point, added to the sum.

    Returns:
        [N] in the dtype of x, summed in float32 (in float64 when x or weight is).

    Raises:
        ValueError: a shape, stride, dtype or device is not as above.
    """
    check_projection(x, weight, offsets, thresholds, bias)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    y = torch.empty(weight.shape[1], dtype=wide, device=x.device)
    for p, (start, end) in enumerate(pairwise(offsets)):
        kept = torch.where(x.float().abs() > thresholds[p], x, 0)
        y[start:end] = kept.to(wide) @ weight[:, start:end].to(wide)
    if bias is not None:
        y += bias.to(wide)
    return y.to(x.dtype)
