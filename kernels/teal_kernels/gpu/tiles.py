# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""One program's tile of a projection: its columns, the rows that survive, their product."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from teal_kernels.gpu.handover import _add
from teal_kernels.gpu.products import COMPILED, _multiply, _pack


class Matrix(NamedTuple):
    """A matrix within a kernel (see `Stored`).

    To be made where it is handed on: what a kernel gives a name of its own is no constant there.
    """

    w_ptr: Any
    grid_ptr: Any
    groups: Any
    scales_ptr: Any
    STRIDE_K: Any
    GROUP: Any


class Tile(NamedTuple):
    """The part of a matrix that a program multiplies (see `Launch`), constants all of them."""

    BLOCK_K: Any
    BLOCK_N: Any
    SLOTS: Any
    MORE: Any


@triton.jit
def _columns(pid, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, SPAN: tl.constexpr):
    """Which of three matrices side by side a program works on, its first column, and their end."""
    SPANS_0: tl.constexpr = (N0 + SPAN - 1) // SPAN
    SPANS_1: tl.constexpr = (N1 + SPAN - 1) // SPAN
    second = pid - SPANS_0
    third = second - SPANS_1
    block = (second >= 0).to(tl.int32)
    start = tl.where(second >= 0, N0 + second * SPAN, pid * SPAN)
    end = tl.where(second >= 0, N0 + N1, N0)
    if N2 > 0:
        block = tl.where(third >= 0, 2, block)
        start = tl.where(third >= 0, N0 + N1 + third * SPAN, start)
        end = tl.where(third >= 0, N0 + N1 + N2, end)
    if N0 % 16 == 0 and N1 % 16 == 0 and N2 % 16 == 0 and SPAN % 16 == 0:
        start = tl.multiple_of(start, 16)
        end = tl.multiple_of(end, 16)
    return block, start, end


@triton.jit
def _fetch_ahead(
    w_ptr,
    row,
    K,
    start,
    end,
    STRIDE_K: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Ask for this program's first rows before it is known which of them survive.

    Between two kernels the memory would idle: the last programs of one drain, those of the next
    wait and work out what to read. Only the programs that can start in that gap ask, and only
    into the L2 cache; a row that is dropped after all has cost idle time.
    """
    if ROWS > 0:  # noqa: SIM102 - known when it is compiled, unlike the other
        if tl.program_id(1) * tl.num_programs(0) + tl.program_id(0) < PROGRAMS:
            LINE: tl.constexpr = 128 // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
            offs_k = row + tl.arange(0, ROWS)
            offs_n = start + tl.arange(0, BLOCK_N // LINE) * LINE
            rows = w_ptr + offs_k.to(tl.int64)[:, None] * STRIDE_K
            inside = (offs_k < K)[:, None] & (offs_n + LINE <= end)[None, :]
            tl.inline_asm_elementwise(
                """{
                .reg .pred p;
                setp.ne.s32 p, $2, 0;
                @p cp.async.bulk.prefetch.L2.global [$1], 128;
                mov.u32 $0, 0;
                }""",
                "=r,l,r",
                [(rows + offs_n[None, :]).to(tl.int64), inside.to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def _count_bits(bits):
    """Set bits of uint32; LLVM knows this form and makes one instruction of it."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return (bits * 0x01010101) >> 24


@triton.jit
def _halve(bits, n, index, WIDTH: tl.constexpr):
    """One step of `_nth_bit`: into the upper half where the lower one has too few bits."""
    low = _count_bits((bits >> index) & ((1 << WIDTH) - 1))
    return tl.where(n >= low, n - low, n), tl.where(n >= low, index + WIDTH, index)


@triton.jit
def _nth_bit(bits, n):
    """Index of the n-th set bit of uint32, from 0; 31 where there are not so many."""
    n, index = _halve(bits, n.to(tl.uint32), tl.zeros_like(n).to(tl.uint32), 16)
    n, index = _halve(bits, n, index, 8)
    n, index = _halve(bits, n, index, 4)
    n, index = _halve(bits, n, index, 2)
    n, index = _halve(bits, n, index, 1)
    return index.to(tl.int32)


@triton.jit
def _load_rows(matrix, rows, mask, start, end, BLOCK_N: tl.constexpr, WORDS: tl.constexpr):
    """Rows of w, each read only where `mask` says so; weights pass through the cache once.

    start, end and BLOCK_N count stored elements. Of int4 a scale and an offset come with every
    WORDS of them; of the others, nothing that is used.
    """
    offs = rows.to(tl.int64)[:, None] * matrix.STRIDE_K
    offs_n = start + tl.arange(0, BLOCK_N)
    inside = mask[:, None] & (offs_n < end)[None, :]
    w_ptr = matrix.w_ptr + offs + offs_n[None, :]
    w = tl.load(w_ptr, mask=inside, other=0, eviction_policy="evict_first")
    if matrix.GROUP <= 0:
        return w, w, w
    else:  # noqa: RET505 - what follows a return is compiled otherwise
        offs_g = start // WORDS + tl.arange(0, BLOCK_N // WORDS)
        inside = mask[:, None] & (offs_g * WORDS < end)[None, :]
        grid = matrix.grid_ptr + 2 * offs + (offs_g // (matrix.GROUP // 8 // WORDS))[None, :]
        scales = tl.load(grid, mask=inside, other=0.0)
        return w, scales, tl.load(grid + matrix.groups, mask=inside, other=0.0)


@triton.jit
def _gather(x, bits, counts, row, first, SLOTS: tl.constexpr):
    """The survivors from `first` on, SLOTS of every 32 channels: their x, row, and existence."""
    GROUPS: tl.constexpr = x.shape[0]
    n = first + tl.arange(0, SLOTS)[None, :]
    index = _nth_bit(bits[:, None], n)
    if COMPILED:
        # Something that the compiler does not repeat: every thread would find every index.
        index = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [index], dtype=tl.int32, is_pure=False, pack=1
        )
    there = n < counts[:, None]
    values = tl.reshape(tl.where(there, tl.gather(x, index, 1), 0.0), (GROUPS * SLOTS,))
    rows = tl.reshape(row + tl.arange(0, GROUPS)[:, None] * 32 + index, (GROUPS * SLOTS,))
    return values, rows, tl.reshape(there, (GROUPS * SLOTS,))


@triton.jit
def _first_bias(bias_ptr, row, start, end, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The biases of a tile's columns, for the first of the programs that add to them; else 0."""
    PACK: tl.constexpr = _pack(GROUP)
    offs_n = start * PACK + tl.arange(0, BLOCK_N * PACK)
    return tl.load(bias_ptr + offs_n, mask=offs_n < tl.where(row == 0, end * PACK, 0), other=0.0)


@triton.jit
def _accumulate(
    y_ptr,
    x,
    matrix,
    tile,
    threshold,
    kept_ptr,
    count,
    row,
    mask_k,
    start,
    end,
    WORDS: tl.constexpr,
    bias,
    MULTIPLIER: tl.constexpr,
):
    """Add a tile's product to y, or a multiple of it and a bias [columns of the tile].

    Channels with abs(x) <= threshold are never loaded.

    NaN is not dropped, so that it reaches the logits and is noticed there.

    With SLOTS the survivors are found first, and the tile is of them alone: SLOTS + MORE of every
    32 channels at once, and in a loop those beyond.
    """
    keep = ~(tl.abs(x) <= threshold) & mask_k
    if tile.SLOTS == 0:
        kept = tl.sum(keep.to(tl.int32), axis=0)
        w = _load_rows(
            matrix, row + tl.arange(0, tile.BLOCK_K), keep, start, end, tile.BLOCK_N, WORDS
        )
        y = _multiply(tl.where(keep, x, 0.0), w, matrix.GROUP, WORDS)
    else:
        GROUPS: tl.constexpr = tile.BLOCK_K // 32
        keep = tl.reshape(keep, (GROUPS, 32)).to(tl.uint32)
        x = tl.reshape(x, (GROUPS, 32))
        bits = tl.sum(keep << tl.arange(0, 32)[None, :].to(tl.uint32), axis=1)
        counts = _count_bits(bits).to(tl.int32)
        kept = tl.sum(counts, axis=0)
        x1, rows1, there1 = _gather(x, bits, counts, row, 0, tile.SLOTS)
        w1 = _load_rows(matrix, rows1, there1, start, end, tile.BLOCK_N, WORDS)
        if tile.MORE > 0:
            x2, rows2, there2 = _gather(x, bits, counts, row, tile.SLOTS, tile.MORE)
            w2 = _load_rows(matrix, rows2, there2, start, end, tile.BLOCK_N, WORDS)
        y = _multiply(x1, w1, matrix.GROUP, WORDS)
        if tile.MORE > 0:
            y += _multiply(x2, w2, matrix.GROUP, WORDS)
        most = tl.max(counts, axis=0)
        first = tile.SLOTS + tile.MORE
        while first < most:
            x1, rows1, there1 = _gather(x, bits, counts, row, first, tile.SLOTS)
            w1 = _load_rows(matrix, rows1, there1, start, end, tile.BLOCK_N, WORDS)
            y += _multiply(x1, w1, matrix.GROUP, WORDS)
            first += tile.SLOTS
    PACK: tl.constexpr = _pack(matrix.GROUP)
    offs_n = start * PACK + tl.arange(0, tile.BLOCK_N * PACK)
    mask_n = offs_n < end * PACK
    if matrix.GROUP >= 0:
        y *= tl.load(matrix.scales_ptr + offs_n, mask=mask_n, other=0.0)
    if bias is not None:
        y += bias
    _add(y_ptr + offs_n, y * MULTIPLIER, mask_n)
    if count:
        tl.atomic_add(kept_ptr, kept, sem="relaxed")
