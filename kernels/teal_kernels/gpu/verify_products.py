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


def _pick(instructions: str) -> tl.constexpr:
    """Four bytes of $2, after these instructions in u, as four float16: 1024 more than each."""
    rest = "prmt.b32 $0, u, 0x64646464, 0x4140; prmt.b32 $1, u, 0x64646464, 0x4342;"
    return tl.constexpr(f"{{ .reg .b32 u; {instructions} {rest} }}")


_OFFSET = _pick("xor.b32 u, $2, 0x80808080;")  # int8, 128 more
_LOW = _pick("and.b32 u, $2, 0x0F0F0F0F;")
_HIGH = _pick("shr.u32 u, $2, 4; and.b32 u, u, 0x0F0F0F0F;")


@triton.jit
def _weights(stored, DTYPE: tl.constexpr):
    """Weights as DTYPE, from floats or from int8 that a scale is yet to multiply."""
    if stored.dtype.is_floating():
        weights = stored.to(DTYPE)
    else:
        weights = _floats(stored, stored ^ -128, _OFFSET, 128, DTYPE)
    return weights


@triton.jit
def _floats(codes, plain, PICK: tl.constexpr, LESS: tl.constexpr, DTYPE: tl.constexpr):
    """What PICK takes of each byte of codes, less LESS, as floats; `plain` is the same, picked.

    As float16 by way of the bits of 1024 + n, four at a time: conversion is slow.
    """
    if COMPILED and DTYPE.is_fp16():
        floats = tl.inline_asm_elementwise(
            PICK, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
        floats -= 1024 + LESS
    else:
        floats = plain.to(tl.uint8, bitcast=True).to(DTYPE) - LESS
    return floats


@triton.jit
def _by_unit(x, BLOCK_K: tl.constexpr, UNITS: tl.constexpr, BYTES: tl.constexpr):
    """Every element of x [BLOCK_K, UNITS] for the bytes of its unit: [BLOCK_K, BYTES]."""
    return tl.reshape(
        tl.broadcast_to(x[:, :, None], (BLOCK_K, UNITS, BYTES // UNITS)), (BLOCK_K, BYTES)
    )


@triton.jit
def product_rows_kernel(
    parts_ptr,
    x_ptr,
    w_ptr,
    grid_ptr,
    scales_ptr,
    rows,
    K,
    N,
    per_part,
    groups,
    stride_w,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """parts [parts, rows, N] = x [rows, K] times w [K, N]: floats, int8, or two int4 a byte.

    UNIT columns of int4 take one lookup of scale and offset. Even and odd columns are two products,
    so that codes stay where they lie.
    """
    BYTES: tl.constexpr = BLOCK_N // 2 if GROUP > 0 else BLOCK_N
    UNITS: tl.constexpr = BLOCK_N // UNIT
    # In float16 a code times its scale, plus its offset, is one instruction for two weights.
    WIDE: tl.constexpr = tl.float16 if DOT.is_fp16() else tl.float32
    start, part = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    offs_m = tl.arange(0, _FEWEST)
    offs_b = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    mask_m = offs_m < rows
    mask_b = offs_b < (N // 2 if GROUP > 0 else N)
    even = tl.zeros((_FEWEST, BYTES), tl.float32)
    odd = tl.zeros((_FEWEST, BYTES), tl.float32)
    _fetch_ahead(
        w_ptr, part * per_part, K, tl.program_id(0) * BYTES, N // 2 if GROUP > 0 else N,
        stride_w, AHEAD, PROGRAMS, BYTES,
    )  # fmt: skip
    _wait(PDL)
    for k in tl.range(
        part * per_part, tl.minimum((part + 1) * per_part, K), BLOCK_K, num_stages=STAGES
    ):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        rows_k = offs_k.to(tl.int64)[:, None]
        stored = tl.load(
            w_ptr + rows_k * stride_w + offs_b[None, :],
            mask=mask_k[:, None] & mask_b[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        x = tl.load(
            x_ptr + offs_m[:, None] * K + offs_k[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        ).to(DOT)
        if GROUP == 0:
            even = tl.dot(x, _weights(stored, DOT), even, input_precision="ieee")
        else:
            offs_g = (start + UNIT * tl.arange(0, UNITS)) // GROUP
            at = grid_ptr + rows_k * (stride_w // 2) + offs_g[None, :]
            mask_g = mask_k[:, None] & (offs_g < groups)[None, :]
            steps = tl.load(at, mask=mask_g, other=0.0).to(WIDE)
            lows = tl.load(at + groups, mask=mask_g, other=0.0).to(WIDE)
            steps = _by_unit(steps, BLOCK_K, UNITS, BYTES)
            lows = _by_unit(lows, BLOCK_K, UNITS, BYTES)
            low = (_floats(stored, stored & 15, _LOW, 0, WIDE) * steps + lows).to(DOT)
            even = tl.dot(x, low, even, input_precision="ieee")
            high = (_floats(stored, stored >> 4, _HIGH, 0, WIDE) * steps + lows).to(DOT)
            odd = tl.dot(x, high, odd, input_precision="ieee")
    mask = mask_m[:, None] & mask_b[None, :]
    out = parts_ptr + (part * rows + offs_m).to(tl.int64)[:, None] * N
    if GROUP == 0:
        if scales_ptr is not None:
            even *= tl.load(scales_ptr + offs_b, mask=mask_b, other=0.0)[None, :]
        tl.store(out + offs_b[None, :], even, mask=mask)
    else:
        scales = tl.load(scales_ptr + 2 * offs_b, mask=mask_b, other=0.0)
        tl.store(out + 2 * offs_b[None, :], even * scales[None, :], mask=mask)
        scales = tl.load(scales_ptr + 2 * offs_b + 1, mask=mask_b, other=0.0)
        tl.store(out + 2 * offs_b[None, :] + 1, odd * scales[None, :], mask=mask)


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
