# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Integers to floats on a GPU, in one pass over memory: what prefill gives to torch's product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program's tile, in weights: 16 bytes of codes a thread, and whole lines of 128 bytes.
_BLOCK_K, _BLOCK_N = 8, 1024
_WARPS = 4


@triton.jit
def dequantize_kernel(
    out_ptr,
    codes_ptr,
    grid_ptr,
    scales_ptr,
    K,
    first,
    last,
    start,
    end,
    groups,
    stride_codes,
    stride_out,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Columns start to end of codes [K, N], int8 or two int4 a byte, as floats.

    They are in bytes first to last of a row. Before start may lie columns that are not asked for,
    so that a tile begins with a UNIT, the columns that one lookup of an int4 scale serves.
    """
    PACK: tl.constexpr = 2 if GROUP else 1
    begin = first + tl.program_id(0) * (BLOCK_N // PACK)
    offs_b = begin + tl.arange(0, BLOCK_N // PACK)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = (offs_k < K)[:, None]
    rows = offs_k.to(tl.int64)[:, None]
    codes = codes_ptr + rows * stride_codes
    mask_b = mask_k & (offs_b < last)[None, :]
    w = tl.load(codes + offs_b[None, :], mask=mask_b, other=0, eviction_policy="evict_first")
    begin *= PACK
    offs_n = begin + tl.arange(0, BLOCK_N)
    if GROUP == 0:
        w = w.to(tl.float32)
    else:
        offs_u = begin // UNIT + tl.arange(0, BLOCK_N // UNIT)
        mask_u = mask_k & (offs_u * UNIT < end)[None, :]
        grid = grid_ptr + rows * (stride_codes // 2) + (offs_u // (GROUP // UNIT))[None, :]
        steps = tl.load(grid, mask=mask_u, other=0.0).to(tl.float32)
        lows = tl.load(grid + groups, mask=mask_u, other=0.0).to(tl.float32)
        w = tl.interleave((w & 15).to(tl.float32), (w >> 4).to(tl.float32))
        w = tl.reshape(w, (BLOCK_K, BLOCK_N // UNIT, UNIT))
        w = tl.reshape(w * steps[:, :, None] + lows[:, :, None], (BLOCK_K, BLOCK_N))
    if BY_ROW:
        w *= tl.load(scales_ptr + offs_k, mask=offs_k < K, other=0.0)[:, None]
    else:
        w *= tl.load(scales_ptr + offs_n, mask=offs_n < end, other=0.0)[None, :]
    inside = mask_k & (offs_n >= start)[None, :] & (offs_n < end)[None, :]
    out = out_ptr + rows * stride_out + (offs_n - start)[None, :]
    tl.store(out, w.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    start: int,
    end: int,
    dtype: torch.dtype,
    *,
    group: int = 0,
    groups: int = 0,
    by_row: bool = False,
) -> Tensor:
    """Columns start to end of quantized rows as floats, equal to torch's to the last bit.

    Args:
        codes: [K, N] int8, or int4 rows as `QuantizedMatrix` has them.
        scales: float32, one a column, or one a row.
        start, end: the columns.
        dtype: of the result, [K, end - start].
        group: columns of an int4 row that share scale and offset; 0 is int8.
        groups: how many there are in a row.
        by_row: whether the scales are the rows'.
    """
    out = torch.empty(codes.shape[0], end - start, dtype=dtype, device=codes.device)
    if not out.numel():
        return out
    unit, pack, grid = 1, 1, codes
    if group:
        unit, pack = min(group & -group, 64), 2  # the largest power of two in a group
        grid = codes.view(torch.float16)[:, -2 * groups :]
    first = start - start % unit
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        dequantize_kernel[triton.cdiv(end - first, _BLOCK_N), triton.cdiv(len(codes), _BLOCK_K)](
            out_ptr=out,
            codes_ptr=codes,
            grid_ptr=grid,
            scales_ptr=scales,
            K=codes.shape[0],
            first=first // pack,
            last=triton.cdiv(end, pack),
            start=start,
            end=end,
            groups=groups,
            stride_codes=codes.stride(0),
            stride_out=out.stride(0),
            GROUP=group,
            UNIT=unit,
            BY_ROW=by_row,
            BLOCK_K=_BLOCK_K,
            BLOCK_N=_BLOCK_N,
            num_warps=_WARPS,
        )
    return out
