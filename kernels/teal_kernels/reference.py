"""The specification of a step's operations, in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def sparse_project(
    x: Tensor, weight: Tensor, offsets: tuple[int, ...], thresholds: Tensor
) -> Tensor:
    """Multiply the channels of x that exceed a threshold with the matrices that they feed.

    TEAL (arXiv 2408.14690, eq. 1 and section 4.4), with one threshold for each of P matrices that
    stand side by side: y[offsets[p]:offsets[p + 1]] = sum of x[i] * weight[i, ...] over the
    channels i but those with abs(x[i]) <= thresholds[p]; a NaN is none of those.

    Args:
        x: [K] floating point.
        weight: [K, N] floating point.
        offsets: P + 1 column bounds, from 0 to N.
        thresholds: [P] float32, compared in float32; 0 drops only exact zeros, -inf nothing.

    Returns:
        [N] in the dtype of x, summed in float32 (in float64 when x or weight is).
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    y = torch.empty(weight.shape[1], dtype=wide, device=x.device)
    for p, (start, end) in enumerate(pairwise(offsets)):
        kept = torch.where(x.float().abs() <= thresholds[p], 0, x)
        y[start:end] = kept.to(wide) @ weight[:, start:end].to(wide)
    return y.to(x.dtype)


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """h [..., H] over its root mean square, times weight [H]; in the dtype of h."""
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.to(h.dtype)


def gated_activation(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [2 * I], gate first (Shazeer, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2)
    return torch.nn.functional.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [heads, D] by one position's cos and sin [D / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None = None
) -> Tensor:
    """Attention of one token over a cache that holds its own key and value already.

    Args:
        q: [heads, D], rotated.
        keys: [key-value heads, length, D]; each serves heads / key-value heads queries.
        values: the same shape.
        position: of the token; it sees this one and those before it.
        window: how many positions, its own included, it sees; None is all.

    Returns:
        [heads * D] in the dtype of q.
    """
    first = 0 if window is None else max(position - window + 1, 0)
    group = q.shape[0] // keys.shape[0]
    seen_keys = keys[:, first : position + 1].to(q.dtype).repeat_interleave(group, dim=0)
    seen_values = values[:, first : position + 1].to(q.dtype).repeat_interleave(group, dim=0)
    scores = (seen_keys @ q[:, :, None])[:, :, 0] * q.shape[1] ** -0.5
    return (scores.softmax(-1)[:, None] @ seen_values).flatten()
