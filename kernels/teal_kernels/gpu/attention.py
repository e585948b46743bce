# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Attention of one token: rotary embedding, cache write and split-KV softmax in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.gpu.handover import _read, _wait


@triton.jit
def _heads(
    qkv_ptr,
    norm_ptr,
    cos,
    sin,
    columns,
    mask_d,
    mask,
    eps,
    HEAD_DIM: tl.constexpr,
    QK_NORM: tl.constexpr,
    offs_1,
    offs_2,
):
    """Both channels of all pairs [rows, HEAD_DIM / 2] of the heads that start at `columns` [rows].

    They are normed and rotated.
    """
    first = _read(qkv_ptr + columns[:, None] + offs_1[None, :], mask)
    second = _read(qkv_ptr + columns[:, None] + offs_2[None, :], mask)
    if QK_NORM:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = 1.0 / tl.sqrt(square / HEAD_DIM + eps)
        gain = tl.load(norm_ptr + offs_1, mask=mask_d, other=0.0).to(tl.float32)
        first = first * scale[:, None] * gain[None, :]
        gain = tl.load(norm_ptr + offs_2, mask=mask_d, other=0.0).to(tl.float32)
        second = second * scale[:, None] * gain[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _pairs(offs_d, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr):
    """The two channels of a head that make up each of its pairs.

    The first ROTARY channels are rotated, halves paired; the rest, which stay, are paired so too.
    """
    if ROTARY == 0 or ROTARY == HEAD_DIM:
        return offs_d, HEAD_DIM // 2 + offs_d
    else:  # noqa: RET505 - what follows a return is compiled otherwise
        rotated = offs_d < ROTARY // 2
        first = tl.where(rotated, offs_d, ROTARY // 2 + offs_d)
        second = tl.where(rotated, ROTARY // 2, HEAD_DIM // 2) + offs_d
        if ROTARY % 32 == 0 and HEAD_DIM % 32 == 0:
            first = tl.max_contiguous(tl.multiple_of(first, 16), 16)
            second = tl.max_contiguous(tl.multiple_of(second, 16), 16)
        return first, second


@triton.jit
def _cache_tile(
    keys_ptr,
    values_ptr,
    tile,
    first,
    last,
    mask_d,
    mask_v,
    offs_1,
    offs_2,
    offs_v,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Both channels of the keys' pairs, and the values, from position `first` to before `last`."""
    offs_t = tile + tl.arange(0, BLOCK_T)
    inside = ((offs_t >= first) & (offs_t < last))[:, None]
    rows = offs_t[:, None].to(tl.int64) * HEAD_DIM
    mask = inside & mask_d[None, :]
    k1 = tl.load(keys_ptr + rows + offs_1[None, :], mask=mask, other=0.0)
    k2 = tl.load(keys_ptr + rows + offs_2[None, :], mask=mask, other=0.0)
    mask = inside & mask_v[None, :]
    return k1, k2, tl.load(values_ptr + rows + offs_v[None, :], mask=mask, other=0.0)


@triton.jit
def attention_kernel(
    parts_ptr,
    maxima_ptr,
    sums_ptr,
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    scales_ptr,
    eps,
    stride_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    STRIDE_COS: tl.constexpr,
    QK_NORM: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One key-value head and one chunk of the positions a program.

    Reads qkv [(HEADS + 2 * KV_HEADS) * HEAD_DIM] accumulators, writes the token's key and value
    to the cache [KV_HEADS, length, HEAD_DIM], and leaves for the heads that share the key-value
    head the maximum, the sum and the weighted values of exp(score - maximum) over the chunk.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    kv_head = tl.program_id(0)
    chunk_start = tl.program_id(1) * CHUNK
    position = tl.load(position_ptr)
    first = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    if (chunk_start <= position) & (chunk_start + CHUNK > first):
        offs_g = tl.arange(0, BLOCK_G)
        offs_d = tl.arange(0, BLOCK_HALF)
        offs_v = tl.arange(0, 2 * BLOCK_HALF)
        mask_g = offs_g < GROUP
        offs_1, offs_2 = _pairs(offs_d, HEAD_DIM, ROTARY)
        mask_d = offs_d < HALF
        mask_v = offs_v < HEAD_DIM
        keys_ptr += kv_head.to(tl.int64) * stride_head
        values_ptr += kv_head.to(tl.int64) * stride_head
        begin = tl.maximum(chunk_start, first // BLOCK_T * BLOCK_T)
        end = tl.minimum(chunk_start + CHUNK, position + 1)
        # The cache's first tile, and with it the rotation, is on its way before the wait.
        next_k1, next_k2, next_v = _cache_tile(
            keys_ptr, values_ptr, begin, first, position, mask_d, mask_v, offs_1, offs_2, offs_v,
            HEAD_DIM, BLOCK_T,
        )  # fmt: skip
        angles, mask_r = position * STRIDE_COS + offs_d, offs_d < ROTARY // 2
        cos = tl.load(cos_ptr + angles, mask=mask_r, other=1.0)[None, :]
        sin = tl.load(sin_ptr + angles, mask=mask_r, other=0.0)[None, :]
        scale = tl.load(scales_ptr + position)
        _wait(PDL)

        columns = (kv_head * GROUP + offs_g) * HEAD_DIM
        q1, q2 = _heads(
            qkv_ptr, q_norm_ptr, cos, sin, columns, mask_d,
            mask_g[:, None] & mask_d[None, :], eps, HEAD_DIM, QK_NORM, offs_1, offs_2,
        )  # fmt: skip
        q1 = (q1 * scale).to(DOT)
        q2 = (q2 * scale).to(DOT)
        k_columns = (HEADS + kv_head) * HEAD_DIM + tl.zeros((1,), tl.int32)
        k1, k2 = _heads(
            qkv_ptr, k_norm_ptr, cos, sin, k_columns, mask_d,
            mask_d[None, :], eps, HEAD_DIM, QK_NORM, offs_1, offs_2,
        )  # fmt: skip
        v_columns = (HEADS + KV_HEADS + kv_head) * HEAD_DIM + offs_v
        v = _read(qkv_ptr + v_columns, mask_v)

        dtype = keys_ptr.dtype.element_ty
        k1 = k1.to(dtype)
        k2 = k2.to(dtype)
        v = v.to(dtype)[None, :]
        if position < chunk_start + CHUNK:
            here = position.to(tl.int64) * HEAD_DIM
            tl.store(keys_ptr + here + offs_1[None, :], k1, mask=mask_d[None, :])
            tl.store(keys_ptr + here + offs_2[None, :], k2, mask=mask_d[None, :])
            tl.store(values_ptr + here + offs_v[None, :], v, mask=mask_v[None, :])

        maximum = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        out = tl.zeros((BLOCK_G, 2 * BLOCK_HALF), tl.float32)
        for tile in range(begin, end, BLOCK_T):
            offs_t = tile + tl.arange(0, BLOCK_T)
            old = (offs_t < position) & (offs_t >= first)
            new = (offs_t == position)[:, None]
            tile_k1, tile_k2, tile_v = next_k1, next_k2, next_v
            if CHUNK > BLOCK_T:
                next_k1, next_k2, next_v = _cache_tile(
                    keys_ptr, values_ptr, tile + BLOCK_T, first, tl.minimum(position, end),
                    mask_d, mask_v, offs_1, offs_2, offs_v, HEAD_DIM, BLOCK_T,
                )  # fmt: skip
            # The token's own key and value come from registers, not from the cache.
            tile_k1 = tl.where(new, k1, tile_k1).to(DOT)
            tile_k2 = tl.where(new, k2, tile_k2).to(DOT)
            tile_v = tl.where(new, v, tile_v).to(DOT)
            scores = tl.dot(q1, tl.trans(tile_k1), input_precision="ieee")
            scores = tl.dot(q2, tl.trans(tile_k2), scores, input_precision="ieee")
            scores = tl.where((old | (offs_t == position))[None, :], scores, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
            weights = tl.exp(scores - new_maximum[:, None])
            shrink = tl.exp(maximum - new_maximum)
            total = total * shrink + tl.sum(weights, axis=1)
            out = tl.dot(weights.to(DOT), tile_v, out * shrink[:, None], input_precision="ieee")
            maximum = new_maximum

        heads = tl.program_id(1) * HEADS + kv_head * GROUP + offs_g
        tl.store(maxima_ptr + heads, maximum, mask=mask_g)
        tl.store(sums_ptr + heads, total, mask=mask_g)
        offs = heads[:, None] * HEAD_DIM + offs_v[None, :]
        tl.store(parts_ptr + offs, out, mask=mask_g[:, None] & mask_v[None, :])
