"""Causal attention of one sequence, with shared keys, windows and a cache that is longer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T of S positions.

    Args:
        q: [heads, T, head_dim].
        k: [key-value heads, S, head_dim]; each serves heads / key-value heads queries.
        v: the same shape.
        window: how many positions, its own included, a query sees; None is all before it.
        scale: of the scores, by default head_dim ** -0.5.
        position: [1] int64, where T is 1 and the position is not the last of the S.

    Returns:
        [T, heads, head_dim].
    """
    rows, columns = q.shape[1], k.shape[1]
    if position is None and window is not None and (unseen := columns - rows - window + 1) > 0:
        k, v = k[:, unseen:], v[:, unseen:]
        columns -= unseen
    limited = window is not None and columns > window
    last = None if position is None else position[:, None]
    if position is None and rows > 1 and (limited or rows < columns):
        last = torch.arange(columns - rows, columns, device=q.device)[:, None]
    mask = None
    if last is not None:
        seen = torch.arange(columns, device=q.device)
        mask = seen <= last
        if limited and window is not None:
            mask &= seen > last - window
    if rows > 1 and mask is not None and (shared := q.shape[0] // k.shape[0]) > 1:
        # With a mask, only the kernels that hold all scores share keys between heads themselves.
        k, v = k.repeat_interleave(shared, dim=0), v.repeat_interleave(shared, dim=0)
    out = F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=rows > 1 and mask is None,
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    return out[0].transpose(0, 1)
