# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Kernels of one token's step, each with the small operations that feed a projection fused in.

Every kernel first waits for the one before it, then lets the next one start: with dependent
launch (compute capability 9.0) a kernel's programs move in as those of the last one leave. What
was written two kernels ago or earlier is safe to read before the wait.

Accumulators are float32, or int64 in fixed point, and added to by relaxed atomics; each is zeroed
by an earlier kernel of the chain.

The projections put their work under a condition that always holds. It keeps the compiler from
mixing the tile's loads with what stands before them: on an H100, at sparsity 0.5, gate_up of
Llama-2-7B takes 32.7 us with it and 34.3 us without, down 18.9 and 19.2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels.gpu.projection import INTERPRETED

# Rows of small tables, aligned or not by layer: one compilation serves all layers.
# Deterministic accumulators are int64: sums of integers do not depend on their order. 36 bits are
# fraction, so that the residual stream may reach 1e8 and the error of a sum stays near 1e-11.
_FIXED_POINT = tl.constexpr(float(1 << 36))

_COMPILED = tl.constexpr(not INTERPRETED)

_ROWS_OF_TABLES = ["thresholds_ptr", "kept_ptr", "scale_ptr"]


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _read(ptr, mask):
    """Sums as float32, from an accumulator of either kind."""
    value = tl.load(ptr, mask=mask, other=0)
    if value.dtype == tl.int64:
        value = value.to(tl.float32) * (1.0 / _FIXED_POINT)
    return value


@triton.jit
def _fixed(ptr, value):
    """A float32 value as the accumulator behind ptr holds it."""
    if ptr.dtype.element_ty == tl.int64:
        value = (value * _FIXED_POINT).to(tl.int64)
    return value


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
    stride_wk,
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
            rows = w_ptr + offs_k.to(tl.int64)[:, None] * stride_wk
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
def _rows(w_ptr, rows, mask, offs_n, end, stride_wk):
    """Rows of w, each read only where `mask` says so; weights pass through the cache once."""
    offs = rows.to(tl.int64)[:, None] * stride_wk + offs_n[None, :]
    inside = mask[:, None] & (offs_n < end)[None, :]
    return tl.load(w_ptr + offs, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _gather(x, bits, counts, w_ptr, row, offs_n, end, stride_wk, first, SLOTS: tl.constexpr):
    """The survivors from `first` on, SLOTS of every 32 channels: their x, and their rows of w."""
    GROUPS: tl.constexpr = x.shape[0]
    n = first + tl.arange(0, SLOTS)[None, :]
    index = _nth_bit(bits[:, None], n)
    if _COMPILED:
        # Something that the compiler does not repeat: every thread would find every index.
        index = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [index], dtype=tl.int32, is_pure=False, pack=1
        )
    there = n < counts[:, None]
    values = tl.reshape(tl.where(there, tl.gather(x, index, 1), 0.0), (GROUPS * SLOTS,))
    rows = tl.reshape(row + tl.arange(0, GROUPS)[:, None] * 32 + index, (GROUPS * SLOTS,))
    there = tl.reshape(there, (GROUPS * SLOTS,))
    return values, _rows(w_ptr, rows, there, offs_n, end, stride_wk)


@triton.jit
def _accumulate(
    y_ptr,
    x,
    w_ptr,
    threshold,
    kept_ptr,
    count,
    row,
    mask_k,
    start,
    end,
    stride_wk,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    MORE: tl.constexpr,
):
    """Add one tile's product to y float32; channels with abs(x) <= threshold are never loaded.

    With SLOTS the survivors are found first, and the tile is of them alone: SLOTS + MORE of every
    32 channels at once, and in a loop those beyond.
    """
    keep = (tl.abs(x) > threshold) & mask_k
    offs_n = start + tl.arange(0, BLOCK_N)
    if SLOTS == 0:
        kept = tl.sum(keep.to(tl.int32), axis=0)
        w = _rows(w_ptr, row + tl.arange(0, BLOCK_K), keep, offs_n, end, stride_wk)
        y = tl.sum(tl.where(keep, x, 0.0)[:, None] * w.to(tl.float32), axis=0)
    else:
        GROUPS: tl.constexpr = BLOCK_K // 32
        keep = tl.reshape(keep, (GROUPS, 32)).to(tl.uint32)
        x = tl.reshape(x, (GROUPS, 32))
        bits = tl.sum(keep << tl.arange(0, 32)[None, :].to(tl.uint32), axis=1)
        counts = _count_bits(bits).to(tl.int32)
        kept = tl.sum(counts, axis=0)
        x1, w1 = _gather(x, bits, counts, w_ptr, row, offs_n, end, stride_wk, 0, SLOTS)
        if MORE > 0:
            x2, w2 = _gather(x, bits, counts, w_ptr, row, offs_n, end, stride_wk, SLOTS, MORE)
        y = tl.sum(x1[:, None] * w1.to(tl.float32), axis=0)
        if MORE > 0:
            y += tl.sum(x2[:, None] * w2.to(tl.float32), axis=0)
        most = tl.max(counts, axis=0)
        first = SLOTS + MORE
        while first < most:
            x1, w1 = _gather(x, bits, counts, w_ptr, row, offs_n, end, stride_wk, first, SLOTS)
            y += tl.sum(x1[:, None] * w1.to(tl.float32), axis=0)
            first += SLOTS
    tl.atomic_add(y_ptr + offs_n, _fixed(y_ptr, y), mask=offs_n < end, sem="relaxed")
    if count:
        tl.atomic_add(kept_ptr, kept, sem="relaxed")


@triton.jit
def _zero(zero_ptr, zero_size, ZERO: tl.constexpr):
    """Clear this program's part of a buffer that a later kernel adds to."""
    if ZERO > 0:
        pid = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        offs = pid * ZERO + tl.arange(0, ZERO)
        tl.store(
            zero_ptr + offs, tl.zeros((ZERO,), zero_ptr.dtype.element_ty), mask=offs < zero_size
        )


@triton.jit
def _inverse_rms(h_ptr, scale_ptr, eps, H, BLOCK_H: tl.constexpr, PROGRAMS: tl.constexpr):
    """1 / rms(h): taken by each of the programs that start together, then read by the others.

    scale is 0 until one of the first has written it; whoever finds it so takes it too.
    """
    pid = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    scale = 0.0
    if pid >= PROGRAMS:
        scale = tl.load(scale_ptr, cache_modifier=".cg")  # not from L1, which may hold the 0
    if scale == 0.0:
        offs_h = tl.arange(0, BLOCK_H)
        h = _read(h_ptr + offs_h, offs_h < H)
        scale = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / H + eps)
        if pid < 64:
            tl.store(scale_ptr, scale)
    return scale


@triton.jit
def _activated(gate_up_ptr, offs_k, INNER):
    """silu(gate) * up at offs_k."""
    mask = offs_k < INNER
    gate = _read(gate_up_ptr + offs_k, mask)
    up = _read(gate_up_ptr + INNER + offs_k, mask)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def embed_kernel(
    h_ptr,
    token_ptr,
    embed_ptr,
    scales_ptr,
    H,
    stride,
    scales,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """h [H] float32 = the token's row of embed [V, H]; the norms' scales are cleared."""
    _wait(PDL)
    if tl.program_id(0) == 0:
        offs_s = tl.arange(0, BLOCK_S)
        tl.store(scales_ptr + offs_s, tl.zeros((BLOCK_S,), tl.float32), mask=offs_s < scales)
    token = tl.load(token_ptr).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(embed_ptr + token * stride + offs, mask=offs < H, other=0.0).to(tl.float32)
    tl.store(h_ptr + offs, _fixed(h_ptr, row), mask=offs < H)


@triton.jit(do_not_specialize_on_alignment=_ROWS_OF_TABLES)
def norm_project_kernel(
    y_ptr,
    h_ptr,
    scale_ptr,
    norm_ptr,
    w_ptr,
    thresholds_ptr,
    kept_ptr,
    zero_ptr,
    zero_size,
    eps,
    H,
    stride_wk,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK_H: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    MORE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y += sparse projections of rms_norm(h) [H]."""
    block, start, end = _columns(tl.program_id(0), N0, N1, N2, BLOCK_N)
    row = tl.program_id(1) * BLOCK_K
    offs_k = row + tl.arange(0, BLOCK_K)
    threshold = tl.load(thresholds_ptr + block)
    _fetch_ahead(w_ptr, row, H, start, end, stride_wk, AHEAD, PROGRAMS, BLOCK_N)
    gain = tl.load(norm_ptr + offs_k, mask=offs_k < H, other=0.0).to(tl.float32)
    _wait(PDL)
    _zero(zero_ptr, zero_size, ZERO)
    if row < H:  # always; see the module's docstring
        h = _read(h_ptr + offs_k, offs_k < H)
        x = h * gain * _inverse_rms(h_ptr, scale_ptr, eps, H, BLOCK_H, PROGRAMS)
        first = (start == 0) | (start == N0) | (start == N0 + N1)
        _accumulate(
            y_ptr, x, w_ptr, threshold, kept_ptr + block, first,
            row, offs_k < H, start, end, stride_wk, BLOCK_K, BLOCK_N, SLOTS, MORE,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_ROWS_OF_TABLES[:2])
def activate_project_kernel(
    y_ptr,
    gate_up_ptr,
    w_ptr,
    thresholds_ptr,
    kept_ptr,
    INNER,
    N,
    stride_wk,
    AHEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    MORE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y += sparse projection of silu(gate) * up; gate_up [2 * INNER] float32."""
    start = tl.program_id(0) * BLOCK_N
    row = tl.program_id(1) * BLOCK_K
    offs_k = row + tl.arange(0, BLOCK_K)
    threshold = tl.load(thresholds_ptr)
    _fetch_ahead(w_ptr, row, INNER, start, N, stride_wk, AHEAD, PROGRAMS, BLOCK_N)
    _wait(PDL)
    if row < INNER:  # always; see the module's docstring
        x = _activated(gate_up_ptr, offs_k, INNER)
        _accumulate(
            y_ptr, x, w_ptr, threshold, kept_ptr, start == 0,
            row, offs_k < INNER, start, N, stride_wk, BLOCK_K, BLOCK_N, SLOTS, MORE,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_ROWS_OF_TABLES[:2])
def combine_project_kernel(
    y_ptr,
    parts_ptr,
    maxima_ptr,
    sums_ptr,
    position_ptr,
    w_ptr,
    bias_ptr,
    thresholds_ptr,
    kept_ptr,
    zero_ptr,
    zero_size,
    N,
    stride_wk,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    ZERO: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    MORE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y += sparse projection of the attention's output, put together from its splits.

    parts [splits, HEADS * HEAD_DIM], maxima and sums [splits, HEADS], all float32; only the splits
    that hold visible positions are read.
    """
    K: tl.constexpr = HEADS * HEAD_DIM
    start = tl.program_id(0) * BLOCK_N
    row = tl.program_id(1) * BLOCK_K
    offs_k = row + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    _fetch_ahead(w_ptr, row, K, start, N, stride_wk, AHEAD, PROGRAMS, BLOCK_N)
    threshold = tl.load(thresholds_ptr)
    position = tl.load(position_ptr)
    first = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    offs_s = tl.arange(0, SPLITS)
    seen = (offs_s * CHUNK <= position) & (offs_s * CHUNK + CHUNK > first)
    mask = seen[:, None] & mask_k[None, :]
    heads = offs_s[:, None] * HEADS + (offs_k // HEAD_DIM)[None, :]
    _wait(PDL)
    _zero(zero_ptr, zero_size, ZERO)
    if BIAS:  # noqa: SIM102 - known when it is compiled, unlike the other
        if tl.program_id(1) == 0:
            offs_n = start + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
            tl.atomic_add(y_ptr + offs_n, _fixed(y_ptr, bias), mask=offs_n < N, sem="relaxed")
    if row < K:  # always; see the module's docstring
        maxima = tl.load(maxima_ptr + heads, mask=mask, other=float("-inf"))
        sums = tl.load(sums_ptr + heads, mask=mask, other=0.0)
        parts = tl.load(parts_ptr + offs_s[:, None] * K + offs_k[None, :], mask=mask, other=0.0)
        top = tl.where(mask_k, tl.max(maxima, axis=0), 0.0)
        share = tl.exp(maxima - top[None, :])
        total = tl.where(mask_k, tl.sum(share * sums, axis=0), 1.0)
        x = tl.sum(share * parts, axis=0) / total
        _accumulate(
            y_ptr, x, w_ptr, threshold, kept_ptr, start == 0,
            row, mask_k, start, N, stride_wk, BLOCK_K, BLOCK_N, SLOTS, MORE,
        )  # fmt: skip


@triton.jit
def logits_kernel(
    logits_ptr,
    h_ptr,
    norm_ptr,
    w_ptr,
    eps,
    H,
    V,
    stride_wv,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits [V] float32 = lm_head [V, H] times rms_norm(h)."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_h = tl.arange(0, BLOCK_H)
    mask_v = offs_v < V
    mask_h = offs_h < H
    rows = w_ptr + offs_v.to(tl.int64)[:, None] * stride_wv
    w = tl.load(
        rows + offs_h[None, :],
        mask=mask_v[:, None] & mask_h[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    gain = tl.load(norm_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    _wait(PDL)
    h = _read(h_ptr + offs_h, mask_h)
    scale = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / H + eps)
    logits = tl.sum(w.to(tl.float32) * (h * scale * gain)[None, :], axis=1)
    tl.store(logits_ptr + offs_v, logits, mask=mask_v)
