# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""What several tokens at once need between their matrix products: norms, rotation, attention."""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.gpu.attention import _cache_tile, _heads


@triton.jit
def norm_kernel(
    x_ptr,
    h_ptr,
    added_ptr,
    bias_ptr,
    norm_ptr,
    eps,
    H,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [M, H] = RMS norm of the residual stream h [M, H] float32, to which `added` comes first."""
    row = tl.program_id(0) * H
    offs = tl.arange(0, BLOCK)
    mask = offs < H
    h = tl.load(h_ptr + row + offs, mask=mask, other=0.0)
    if ADD:
        h += tl.load(added_ptr + row + offs, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            h += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(h_ptr + row + offs, h, mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / H + eps)
    gain = tl.load(norm_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + row + offs, (h * scale * gain).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    qkv_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    eps,
    stride_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BIAS: tl.constexpr,
    QK_NORM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One token and one head a program: q [M, HEADS, HEAD_DIM] rotated, keys and values cached.

    Reads qkv [M, (HEADS + 2 * KV_HEADS) * HEAD_DIM].
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(position_ptr) + row
    qkv_ptr += row * (HEADS + 2 * KV_HEADS) * HEAD_DIM
    offs_d = tl.arange(0, BLOCK_HALF)
    mask_d = offs_d < HALF
    mask = mask_d[None, :]
    columns = head * HEAD_DIM + tl.zeros((1,), tl.int32)
    cos = tl.load(cos_ptr + position * HALF + offs_d, mask=mask_d, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + offs_d, mask=mask_d, other=0.0)[None, :]
    offs = offs_d[None, :]
    here = position.to(tl.int64) * HEAD_DIM + offs
    if head < HEADS:
        first, second = _heads(
            qkv_ptr, bias_ptr, q_norm_ptr, cos, sin, columns, mask_d, mask, eps,
            HALF, BIAS, QK_NORM, offs_d,
        )  # fmt: skip
        out = q_ptr + (row * HEADS + head) * HEAD_DIM + offs
        dtype = q_ptr.dtype.element_ty
        tl.store(out, first.to(dtype), mask=mask)
        tl.store(out + HALF, second.to(dtype), mask=mask)
    elif head < HEADS + KV_HEADS:
        first, second = _heads(
            qkv_ptr, bias_ptr, k_norm_ptr, cos, sin, columns, mask_d, mask, eps,
            HALF, BIAS, QK_NORM, offs_d,
        )  # fmt: skip
        out = keys_ptr + (head - HEADS).to(tl.int64) * stride_head + here
        dtype = keys_ptr.dtype.element_ty
        tl.store(out, first.to(dtype), mask=mask)
        tl.store(out + HALF, second.to(dtype), mask=mask)
    else:
        # A value is neither normed nor rotated.
        first, second = _heads(
            qkv_ptr, bias_ptr, k_norm_ptr, cos * 0 + 1, sin * 0, columns, mask_d, mask, eps,
            HALF, BIAS, False, offs_d,
        )  # fmt: skip
        out = values_ptr + (head - HEADS - KV_HEADS).to(tl.int64) * stride_head + here
        dtype = values_ptr.dtype.element_ty
        tl.store(out, first.to(dtype), mask=mask)
        tl.store(out + HALF, second.to(dtype), mask=mask)


@triton.jit
def attend_kernel(
    parts_ptr,
    maxima_ptr,
    sums_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    scale,
    stride_head,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    DOT: tl.constexpr,
):
    """One key-value head and one chunk of the positions a program, for all tokens.

    A row is a token and one of the heads that share the key-value head. Leaves for each the
    maximum, the sum and the weighted values of exp(score - maximum) over the chunk; the first
    two are -inf and 0 where the row sees nothing of it.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    kv_head = tl.program_id(0)
    start = tl.program_id(1) * CHUNK
    position = tl.load(position_ptr)
    first = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    end = tl.minimum(start + CHUNK, position + TOKENS)
    if (start < end) & (start + CHUNK > first):
        offs_r = tl.arange(0, BLOCK_R)
        offs_d = tl.arange(0, BLOCK_HALF)
        offs_v = tl.arange(0, 2 * BLOCK_HALF)
        mask_r = offs_r < TOKENS * GROUP
        mask_d = offs_d < HALF
        mask_v = offs_v < HEAD_DIM
        seen = position + offs_r // GROUP  # the last position that a row sees, its own
        heads = offs_r // GROUP * HEADS + kv_head * GROUP + offs_r % GROUP
        offs = heads[:, None] * HEAD_DIM + offs_d[None, :]
        mask = mask_r[:, None] & mask_d[None, :]
        q1 = tl.load(q_ptr + offs, mask=mask, other=0.0).to(DOT)
        q2 = tl.load(q_ptr + offs + HALF, mask=mask, other=0.0).to(DOT)
        keys_ptr += kv_head.to(tl.int64) * stride_head
        values_ptr += kv_head.to(tl.int64) * stride_head

        maximum = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        out = tl.zeros((BLOCK_R, 2 * BLOCK_HALF), tl.float32)
        begin = tl.maximum(start, first // BLOCK_T * BLOCK_T)
        for tile in range(begin, end, BLOCK_T):
            k1, k2, v = _cache_tile(
                keys_ptr, values_ptr, tile, first, end, mask_d, mask_v, offs_d, offs_v,
                HALF, HEAD_DIM, BLOCK_T,
            )  # fmt: skip
            offs_t = tile + tl.arange(0, BLOCK_T)
            scores = tl.dot(q1, tl.trans(k1.to(DOT)), input_precision="ieee")
            scores = tl.dot(q2, tl.trans(k2.to(DOT)), scores, input_precision="ieee") * scale
            visible = offs_t[None, :] <= seen[:, None]
            if WINDOW > 0:
                visible = visible & (offs_t[None, :] > seen[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(maximum, tl.max(scores, axis=1))
            # A row that has seen nothing yet keeps -inf, from which nothing may be taken.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(scores - base[:, None])
            shrink = tl.exp(maximum - base)
            total = total * shrink + tl.sum(weights, axis=1)
            out = tl.dot(weights.to(DOT), v.to(DOT), out * shrink[:, None], input_precision="ieee")
            maximum = higher

        rows = tl.program_id(1) * TOKENS * HEADS + heads
        tl.store(maxima_ptr + rows, maximum, mask=mask_r)
        tl.store(sums_ptr + rows, total, mask=mask_r)
        offs = rows[:, None] * HEAD_DIM + offs_v[None, :]
        tl.store(parts_ptr + offs, out, mask=mask_r[:, None] & mask_v[None, :])


@triton.jit
def combine_kernel(
    x_ptr,
    parts_ptr,
    maxima_ptr,
    sums_ptr,
    position_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token and head a program: x [M, HEADS, HEAD_DIM] from the chunks that it saw."""
    row = tl.program_id(0) * HEADS + tl.program_id(1)
    position = tl.load(position_ptr)
    first = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    chunks = tl.arange(0, SPLITS)
    live = (chunks * CHUNK < position + TOKENS) & (chunks * CHUNK + CHUNK > first)
    rows = chunks * TOKENS * HEADS + row
    maxima = tl.load(maxima_ptr + rows, mask=live, other=float("-inf"))
    weights = tl.exp(maxima - tl.max(maxima, axis=0))
    total = tl.sum(weights * tl.load(sums_ptr + rows, mask=live, other=0.0), axis=0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    offs = rows[:, None] * HEAD_DIM + offs_d[None, :]
    parts = tl.load(parts_ptr + offs, mask=live[:, None] & mask_d[None, :], other=0.0)
    out = tl.sum(weights[:, None] * parts, axis=0) / total
    tl.store(x_ptr + row * HEAD_DIM + offs_d, out.to(x_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def activate_kernel(x_ptr, gate_up_ptr, INNER, BLOCK: tl.constexpr):
    """x [M, INNER] = silu(gate) * up of gate_up [M, 2 * INNER], gate first."""
    row = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < INNER
    gate = tl.load(gate_up_ptr + row * 2 * INNER + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * INNER + INNER + offs, mask=mask, other=0.0).to(tl.float32)
    active = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(x_ptr + row * INNER + offs, active.to(x_ptr.dtype.element_ty), mask=mask)
