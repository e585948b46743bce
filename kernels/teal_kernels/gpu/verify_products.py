# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Products of several tokens; integers become floats on the way to the tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.gpu.handover import _wait
from teal_kernels.gpu.products import COMPILED
from teal_kernels.gpu.tiles import _fetch_ahead

_FEWEST = tl.constexpr(16)  # rows that the tensor cores take
# Four int8 as four float16, by way of the bits of 1024 + n: conversion is slow.
_FOUR = tl.constexpr(
    "{ .reg .b32 u; xor.b32 u, $2, 0x80808080;"
    " prmt.b32 $0, u, 0x64646464, 0x4140; prmt.b32 $1, u, 0x64646464, 0x4342; }"
)


@triton.constexpr_function
def _int8_asm(upper, dtype):
    """From two int8 in each half of $1, one as a float of 16 bits."""
    if dtype.is_bf16():
        # The lower seven bits n as 128 + n, less 128, or 256 where the sign is set.
        return (
            f"{{ .reg .b32 u, v, w; shr.u32 u, $1, {8 * upper};"
            " and.b32 v, u, 0x007F007F; or.b32 v, v, 0x43004300;"
            " and.b32 u, u, 0x00800080; or.b32 u, u, 0x43004300;"
            " mov.b32 w, 0xBF80BF80; fma.rn.bf16x2 $0, u, w, v; }"
        )
    return (
        "{ .reg .b32 u, v; xor.b32 u, $1, 0x80808080;"
        f" prmt.b32 u, u, 0x64646464, {'0x4341' if upper else '0x4240'};"
        " mov.b32 v, 0xE480E480; add.rn.f16x2 $0, u, v; }"
    )


@triton.constexpr_function
def _int4_asm(index, dtype):
    """From four codes in each half of $1, one as a float of 16 bits, in `_int4_units`."""
    if dtype.is_bf16():
        return (
            f"{{ .reg .b32 u, v, w; shr.u32 u, $1, {4 * index}; and.b32 u, u, 0x000F000F;"
            " or.b32 u, u, 0x43004300; mov.b32 v, 0x3F803F80; mov.b32 w, 0xC300C300;"
            " fma.rn.bf16x2 $0, u, v, w; }"
        )
    mask = "0x00F000F0" if index % 2 else "0x000F000F"
    return f"{{ .reg .b32 u; shr.u32 u, $1, {8 * (index // 2)}; and.b32 $0, u, {mask}; }}"


@triton.constexpr_function
def _int4_units(index, dtype):
    """Units in 1 of the codes of `_int4_asm`.

    The bits of a code are those of a float16, subnormal or nearly so, which the tensor cores take
    exactly: nothing but a mask is needed.
    """
    if dtype.is_bf16():
        return 1.0
    return 2.0**20 if index % 2 else 2.0**24


@triton.jit
def _weights(stored, DTYPE: tl.constexpr):
    """Weights as DTYPE, from floats or from int8 that a scale is yet to multiply."""
    if stored.dtype.is_floating():
        weights = stored.to(DTYPE)
    elif COMPILED and DTYPE.is_fp16():
        weights = tl.inline_asm_elementwise(
            _FOUR, "=r,=r,r", [stored], dtype=tl.float16, is_pure=True, pack=4
        )
        weights -= 1024 + 128
    else:
        weights = stored.to(DTYPE)
    return weights


@triton.jit
def _unpacked(stored, plain, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """What ASM takes of each int16, exact in DTYPE; `plain` is the same without it.

    One result an asm: then int16 leave shared memory in the layout of the tensor cores' operand
    (ldmatrix.trans), and are unpacked in registers.
    """
    if COMPILED and DTYPE.is_bf16():
        floats = tl.inline_asm_elementwise(
            ASM, "=r,r", [stored], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif COMPILED:
        floats = tl.inline_asm_elementwise(
            ASM, "=r,r", [stored], dtype=tl.float16, is_pure=True, pack=2
        ).to(DTYPE)
    else:
        floats = plain.to(DTYPE)
    return floats


@triton.jit
def _code(fours, INDEX: tl.constexpr, DTYPE: tl.constexpr):
    """One of the four codes of each int16, in `_int4_units`."""
    plain = (fours >> (4 * INDEX) & 15).to(tl.float32) / _int4_units(INDEX, DTYPE)
    return _unpacked(fours, plain, _int4_asm(INDEX, DTYPE), DTYPE)


@triton.jit
def product_rows_kernel(
    parts_ptr,
    x_ptr,
    w_ptr,
    K,
    N,
    per_part,
    stride_w,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """parts [parts, ROWS, N] = x [ROWS, K] times w [K, N], floats."""
    start, part = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    offs_m = tl.arange(0, _FEWEST)
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < ROWS, offs_n < N
    total = tl.zeros((_FEWEST, BLOCK_N), tl.float32)
    _fetch_ahead(w_ptr, part * per_part, K, start, N, stride_w, AHEAD, PROGRAMS, BLOCK_N)
    _wait(PDL)
    for k in tl.range(
        part * per_part, tl.minimum((part + 1) * per_part, K), BLOCK_K, num_stages=STAGES
    ):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        w = tl.load(
            w_ptr + offs_k.to(tl.int64)[:, None] * stride_w + offs_n[None, :],
            mask=mask_k[:, None] & mask_n[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        x = tl.load(
            x_ptr + offs_m[:, None] * K + offs_k[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        total = tl.dot(x.to(DOT), w.to(DOT), total, input_precision="ieee")
    out = parts_ptr + (part * ROWS + offs_m).to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out, total, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def int8_rows_kernel(
    parts_ptr,
    x_ptr,
    w_ptr,
    scales_ptr,
    K,
    N,
    per_part,
    ROWS: tl.constexpr,
    STRIDE_K: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """parts [parts, ROWS, N] = x [ROWS, K] times int8 w [K, N], read as int16 of two outputs.

    Even and odd outputs are two products, in which outputs are rows and tokens columns. EVEN says
    that blocks fill K and N.
    """
    H: tl.constexpr = BLOCK_N // 2
    part, start = tl.program_id(1), tl.program_id(0) * H
    offs_m = tl.arange(0, ROWS)
    offs_h = start + tl.arange(0, H)
    even = tl.zeros((H, ROWS), tl.float32)
    odd = tl.zeros((H, ROWS), tl.float32)
    _fetch_ahead(w_ptr, part * per_part, K, start, N // 2, STRIDE_K, AHEAD, PROGRAMS, H)
    _wait(PDL)
    for k in tl.range(
        part * per_part, tl.minimum((part + 1) * per_part, K), BLOCK_K, num_stages=STAGES
    ):
        offs_k = k + tl.arange(0, BLOCK_K)
        # Indexed as the product wants it: of a transposed load ldmatrix could make nothing.
        block = w_ptr + tl.cast(k, tl.int64) * STRIDE_K
        at = block + (tl.arange(0, BLOCK_K)[None, :] * STRIDE_K + offs_h[:, None])
        at_x = x_ptr + offs_m[None, :] * K + offs_k[:, None]
        if EVEN:
            pairs = tl.load(at, eviction_policy="evict_first")
            x = tl.load(at_x)
        else:
            inside = (offs_h < N // 2)[:, None] & (offs_k < K)[None, :]
            pairs = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
            x = tl.load(at_x, mask=(offs_k < K)[:, None], other=0.0)
        x = x.to(DOT)
        lower = _unpacked(pairs, pairs.to(tl.int8), _int8_asm(0, DOT), DOT)
        even = tl.dot(lower, x, even, input_precision="ieee")
        upper = _unpacked(pairs, pairs >> 8, _int8_asm(1, DOT), DOT)
        odd = tl.dot(upper, x, odd, input_precision="ieee")
    y = tl.reshape(tl.permute(tl.join(even, odd), (1, 0, 2)), (ROWS, BLOCK_N))
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    y *= tl.load(scales_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    out = parts_ptr + (part * ROWS + offs_m).to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out, y, mask=mask_n[None, :])


@triton.jit
def int4_rows_kernel(
    parts_ptr,
    x_ptr,
    w_ptr,
    grid_ptr,
    scales_ptr,
    K,
    N,
    per_part,
    groups,
    ROWS: tl.constexpr,
    STRIDE_K: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """parts [parts, ROWS, N] = x [ROWS, K] times int4 w [K, N], read as int16 of four outputs.

    A program takes G groups of GROUP columns, a multiple of 4 that H int16 hold. Within a group a
    row's scale multiplies x instead of weights, and is rounded with it to DOT: columns are of one
    size (see `QuantizedMatrix.int4`), scales near 1 and below, so that it stays in float16's range
    where x does. Offsets are a product of their own, of one column that is there 16 times.

    EVEN says that blocks fill K and N, and H the group.
    """
    COLUMNS: tl.constexpr = 4 * H
    part, start = tl.program_id(1), tl.program_id(0) * (G * GROUP // 4)
    offs_m = tl.arange(0, ROWS)[None, None, :]
    within = tl.arange(0, H)[None, :, None]
    offs_g = (tl.program_id(0) * G + tl.arange(0, G))[:, None, None]
    offs_h = offs_g * (GROUP // 4) + within
    mask_g = offs_g < groups
    mask_h = (within < GROUP // 4) & (offs_h < N // 4)
    first = tl.zeros((G, H, ROWS), tl.float32)
    second = tl.zeros((G, H, ROWS), tl.float32)
    third = tl.zeros((G, H, ROWS), tl.float32)
    fourth = tl.zeros((G, H, ROWS), tl.float32)
    low = tl.zeros((G, _FEWEST, ROWS), tl.float32)
    _fetch_ahead(w_ptr, part * per_part, K, start, N // 4, STRIDE_K, AHEAD, PROGRAMS, G * H)
    _wait(PDL)
    for k in tl.range(
        part * per_part, tl.minimum((part + 1) * per_part, K), BLOCK_K, num_stages=STAGES
    ):
        offs_k = k + tl.arange(0, BLOCK_K)
        before, rows = tl.cast(k, tl.int64) * STRIDE_K, tl.arange(0, BLOCK_K) * STRIDE_K
        # Indexed as the product wants it: of a transposed load ldmatrix could make nothing.
        at = w_ptr + before + (rows[None, None, :] + offs_h)
        at_x = x_ptr + offs_m * K + offs_k[None, :, None]
        at_steps = grid_ptr + before + (rows[None, :, None] + offs_g)
        at_lows = grid_ptr + groups + before + (rows[None, None, :] + offs_g)
        if EVEN:
            fours = tl.load(at, eviction_policy="evict_first")
            x = tl.load(at_x)
            steps, lows = tl.load(at_steps), tl.load(at_lows)
        else:
            mask_a, mask_b = (offs_k < K)[None, None, :], (offs_k < K)[None, :, None]
            fours = tl.load(at, mask=mask_h & mask_a, other=0, eviction_policy="evict_first")
            x = tl.load(at_x, mask=mask_b, other=0.0)
            steps = tl.load(at_steps, mask=mask_g & mask_b, other=0.0)
            lows = tl.load(at_lows, mask=mask_g & mask_a, other=0.0)
        if DOT.is_fp16():
            scaled = x * steps
        else:
            scaled = (x.to(tl.float32) * steps.to(tl.float32)).to(DOT)
        x = tl.broadcast_to(x.to(DOT), (G, BLOCK_K, ROWS))
        lows = tl.broadcast_to(lows.to(DOT), (G, _FEWEST, BLOCK_K))
        low = tl.dot(lows, x, low, input_precision="ieee")
        first = tl.dot(_code(fours, 0, DOT), scaled, first, input_precision="ieee")
        second = tl.dot(_code(fours, 1, DOT), scaled, second, input_precision="ieee")
        third = tl.dot(_code(fours, 2, DOT), scaled, third, input_precision="ieee")
        fourth = tl.dot(_code(fours, 3, DOT), scaled, fourth, input_precision="ieee")
    offset = tl.max(low, axis=1)[:, None, :]
    UNITS: tl.constexpr = _int4_units(0, DOT)
    HIGHER: tl.constexpr = _int4_units(1, DOT)
    even = tl.join(first * UNITS + offset, third * UNITS + offset)
    odd = tl.join(second * HIGHER + offset, fourth * HIGHER + offset)
    y = tl.reshape(tl.permute(tl.join(even, odd), (2, 0, 1, 3, 4)), (ROWS, G * COLUMNS))
    column = tl.arange(0, G * COLUMNS)
    offs_n = tl.program_id(0) * (G * GROUP) + column // COLUMNS * GROUP + column % COLUMNS
    mask_n = (column % COLUMNS < GROUP) & (offs_n < N)
    y *= tl.load(scales_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    at_row = (part * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None] * N
    tl.store(parts_ptr + at_row + offs_n[None, :], y, mask=mask_n[None, :])


@triton.jit
def logits_rows_kernel(
    logits_ptr,
    x_ptr,
    w_ptr,
    scales_ptr,
    rows,
    H,
    V,
    stride_w,
    MULTIPLIER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits [rows, V] float32 = x [rows, H] times lm_head [V, H]: floats, or int8 with scales."""
    offs_m = tl.arange(0, _FEWEST)
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_m, mask_v = offs_m < rows, offs_v < V
    total = tl.zeros((BLOCK_V, _FEWEST), tl.float32)
    _wait(PDL)
    for h in tl.range(0, H, BLOCK_H, num_stages=STAGES):
        offs_h = h + tl.arange(0, BLOCK_H)
        mask_h = offs_h < H
        stored = tl.load(
            w_ptr + offs_v.to(tl.int64)[:, None] * stride_w + offs_h[None, :],
            mask=mask_v[:, None] & mask_h[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        x = tl.load(
            x_ptr + offs_m[None, :] * H + offs_h[:, None],
            mask=mask_m[None, :] & mask_h[:, None],
            other=0.0,
        )
        total = tl.dot(_weights(stored, DOT), x.to(DOT), total, input_precision="ieee")
    total *= MULTIPLIER
    if scales_ptr is not None:
        total *= tl.load(scales_ptr + offs_v, mask=mask_v, other=0.0)[:, None]
    out = logits_ptr + offs_m[None, :].to(tl.int64) * V + offs_v[:, None]
    tl.store(out, total, mask=mask_v[:, None] & mask_m[None, :])
