# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Kernels of the dense step for several tokens at once: what stands between its products.

Tokens are rows. A product leaves float32 parts [PARTS, rows, N] of its sums, which the kernel after
it adds up; the product of floats, the library's, leaves one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.gpu.attention import _pairs
from teal_kernels.gpu.handover import _wait


@triton.jit
def _total(parts_ptr, offs, mask, size, PARTS: tl.constexpr):
    """Sums at offs of parts [PARTS, size]."""
    total = tl.load(parts_ptr + offs, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts_ptr + part * size + offs, mask=mask, other=0.0)
    return total


@triton.jit
def embed_rows_kernel(
    h_ptr,
    tokens_ptr,
    embed_ptr,
    H,
    stride,
    MULTIPLIER: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """h [rows, H] float32 = the tokens' rows of embed [V, H], scaled."""
    _wait(PDL)
    row = tl.program_id(0)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(embed_ptr + token * stride + offs, mask=offs < H, other=0.0)
    tl.store(h_ptr + row * H + offs, values.to(tl.float32) * MULTIPLIER, mask=offs < H)


@triton.jit
def norm_rows_kernel(
    x_ptr,
    h_ptr,
    parts_ptr,
    bias_ptr,
    norm_ptr,
    size,
    eps,
    H,
    MULTIPLIER: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """h [rows, H] += the multiple of what o or down has left; x [rows, H] = rms_norm(h)."""
    offs_h = tl.arange(0, BLOCK_H)
    mask = offs_h < H
    gain = tl.load(norm_ptr + offs_h, mask=mask, other=0.0).to(tl.float32)
    _wait(PDL)
    offs = tl.program_id(0) * H + offs_h
    h = tl.load(h_ptr + offs, mask=mask, other=0.0)
    if PARTS > 0:
        added = _total(parts_ptr, offs, mask, size, PARTS)
        if bias_ptr is not None:
            added += tl.load(bias_ptr + offs_h, mask=mask, other=0.0).to(tl.float32)
        h += added * MULTIPLIER
        tl.store(h_ptr + offs, h, mask=mask)
    x = h * gain / tl.sqrt(tl.sum(h * h, axis=0) / H + eps)
    tl.store(x_ptr + offs, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def place_rows_kernel(
    q_ptr,
    parts_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    scales_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    count_ptr,
    size,
    eps,
    stride_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    STRIDE_COS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row's head of q, k or v a program: biased, normed, rotated; k and v go into the cache.

    q [rows, HEADS * HEAD_DIM] is scaled for the scores already.
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    row, head = tl.program_id(0), tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_HALF)
    mask = offs_d < HEAD_DIM // 2
    offs_1, offs_2 = _pairs(offs_d, HEAD_DIM, ROTARY)
    position = tl.load(position_ptr) + row
    token = row < tl.load(count_ptr)
    mask_c = offs_d < tl.where(token, HEAD_DIM // 2, 0)  # only tokens are cached
    rotated = (head < HEADS + KV_HEADS) & token
    mask_r = offs_d < tl.where(rotated, ROTARY // 2, 0)
    angles = position * STRIDE_COS + offs_d
    cos = tl.load(cos_ptr + angles, mask=mask_r, other=1.0)
    sin = tl.load(sin_ptr + angles, mask=mask_r, other=0.0)
    _wait(PDL)
    columns = row * (HEADS + 2 * KV_HEADS) * HEAD_DIM + head * HEAD_DIM
    first = _total(parts_ptr, columns + offs_1, mask, size, PARTS)
    second = _total(parts_ptr, columns + offs_2, mask, size, PARTS)
    if bias_ptr is not None:
        bias = bias_ptr + head * HEAD_DIM
        first += tl.load(bias + offs_1, mask=mask, other=0.0).to(tl.float32)
        second += tl.load(bias + offs_2, mask=mask, other=0.0).to(tl.float32)
    if q_norm_ptr is not None:  # noqa: SIM102 - known when it is compiled, unlike the other
        if head < HEADS + KV_HEADS:
            norm_ptr = q_norm_ptr
            if head >= HEADS:
                norm_ptr = k_norm_ptr
            square = tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)
            root = 1.0 / tl.sqrt(square / HEAD_DIM + eps)
            first *= root * tl.load(norm_ptr + offs_1, mask=mask, other=0.0).to(tl.float32)
            second *= root * tl.load(norm_ptr + offs_2, mask=mask, other=0.0).to(tl.float32)
    y1 = first * cos - second * sin
    y2 = second * cos + first * sin
    if head < HEADS:
        scale = tl.load(scales_ptr + tl.where(token, position, 0))
        queries = q_ptr + (row * HEADS + head) * HEAD_DIM
        tl.store(queries + offs_1, (y1 * scale).to(DTYPE), mask=mask)
        tl.store(queries + offs_2, (y2 * scale).to(DTYPE), mask=mask)
    else:
        cache = keys_ptr + (head - HEADS).to(tl.int64) * stride_head
        if head >= HEADS + KV_HEADS:
            cache = values_ptr + (head - HEADS - KV_HEADS).to(tl.int64) * stride_head
        cache += position.to(tl.int64) * HEAD_DIM
        tl.store(cache + offs_1, y1.to(DTYPE), mask=mask_c)
        tl.store(cache + offs_2, y2.to(DTYPE), mask=mask_c)


@triton.jit
def attention_rows_kernel(
    parts_ptr,
    maxima_ptr,
    sums_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    count_ptr,
    stride_head,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One key-value head and one chunk of the positions a program, for every row.

    Leaves the maximum, the sum and the weighted values of exp(score - maximum) over the chunk:
    maxima and sums [splits, ROWS, HEADS], parts [splits, ROWS, HEADS, HEAD_DIM].
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(0)
    chunk_start = tl.program_id(1) * CHUNK
    position = tl.load(position_ptr)
    end = position + tl.load(count_ptr)
    first = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    if (chunk_start < end) & (chunk_start + CHUNK > first):
        offs_r = tl.arange(0, BLOCK_R)
        offs_d = tl.arange(0, BLOCK_D)
        mask_r = offs_r < ROWS * GROUP
        mask_d = offs_d < HEAD_DIM
        row = offs_r // GROUP
        heads = row * HEADS + kv_head * GROUP + offs_r % GROUP
        keys_ptr += kv_head.to(tl.int64) * stride_head
        values_ptr += kv_head.to(tl.int64) * stride_head
        _wait(PDL)
        mask = mask_r[:, None] & mask_d[None, :]
        q = tl.load(q_ptr + heads[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
        q = q.to(DOT)
        last = (position + row)[:, None]
        maximum = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        out = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        begin = tl.maximum(chunk_start, first // BLOCK_T * BLOCK_T)
        for tile in range(begin, tl.minimum(chunk_start + CHUNK, end), BLOCK_T):
            offs_t = tile + tl.arange(0, BLOCK_T)
            offs = offs_t[:, None].to(tl.int64) * HEAD_DIM + offs_d[None, :]
            mask_t = (offs_t < end)[:, None] & mask_d[None, :]
            keys = tl.load(keys_ptr + offs, mask=mask_t, other=0.0).to(DOT)
            values = tl.load(values_ptr + offs, mask=mask_t, other=0.0).to(DOT)
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
            seen = offs_t[None, :] <= last
            if WINDOW > 0:
                seen &= offs_t[None, :] > last - WINDOW
            scores = tl.where(seen & (offs_t < end)[None, :], scores, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
            # A row may see nothing of a chunk, or of its first tiles.
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weights = tl.exp(scores - base[:, None])
            shrink = tl.exp(maximum - base)
            total = total * shrink + tl.sum(weights, axis=1)
            out = tl.dot(weights.to(DOT), values, out * shrink[:, None], input_precision="ieee")
            maximum = new_maximum
        at = tl.program_id(1) * ROWS * HEADS + heads
        tl.store(maxima_ptr + at, maximum, mask=mask_r)
        tl.store(sums_ptr + at, total, mask=mask_r)
        tl.store(parts_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], out, mask=mask)


@triton.jit
def combine_rows_kernel(
    x_ptr,
    parts_ptr,
    maxima_ptr,
    sums_ptr,
    position_ptr,
    count_ptr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [rows, HEADS * HEAD_DIM] = attention's output, a row's head a program."""
    row, head = tl.program_id(0), tl.program_id(1)
    offs_s = tl.arange(0, SPLITS)
    offs_d = tl.arange(0, BLOCK_D)
    position = tl.load(position_ptr)
    first = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    # What the chunks of this call hold, and no more.
    end = position + tl.load(count_ptr)
    seen = (offs_s * CHUNK < end) & (offs_s * CHUNK + CHUNK > first)
    _wait(PDL)
    at = (offs_s * ROWS + row) * HEADS + head
    maxima = tl.load(maxima_ptr + at, mask=seen, other=float("-inf"))
    sums = tl.load(sums_ptr + at, mask=seen, other=0.0)
    mask = seen[:, None] & (offs_d < HEAD_DIM)[None, :]
    parts = tl.load(parts_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
    share = tl.exp(maxima - tl.max(maxima, axis=0))
    x = tl.sum(share[:, None] * parts, axis=0) / tl.sum(share * sums, axis=0)
    out = x_ptr + (row * HEADS + head) * HEAD_DIM + offs_d
    tl.store(out, x.to(x_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


@triton.jit
def activate_rows_kernel(
    x_ptr, parts_ptr, size, INNER, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """x [rows, INNER] = silu(gate) * up, which lie side by side in a row of parts."""
    row = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < INNER
    _wait(PDL)
    at = row * 2 * INNER + offs
    gate = _total(parts_ptr, at, mask, size, PARTS)
    up = _total(parts_ptr, at + INNER, mask, size, PARTS)
    x = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(x_ptr + row * INNER + offs, x.to(x_ptr.dtype.element_ty), mask=mask)
