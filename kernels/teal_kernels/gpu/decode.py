# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Kernels of one token's step, each with the small operations that feed a projection fused in.

Every kernel first waits for the one before it, then lets the next one start: with dependent
launch (compute capability 9.0) a kernel's programs move in as those of the last one leave. What
was written two kernels ago or earlier is safe to read before the wait.

Kernels are launched by keywords. A matrix is w_ptr, grid_ptr, groups, w_scales_ptr, STRIDE_K and
GROUP, which `Stored.arguments` gives, and within a kernel one `Matrix`; a `Tile` is how it is cut.
Columns and BLOCK_N count its stored elements, each of which holds several columns when it is
quantized.

The projections put their work under a condition that always holds. It keeps the compiler from
mixing the tile's loads with what stands before them: on an H100, at sparsity 0.5, gate_up of
Llama-2-7B takes 32.7 us with it and 34.3 us without, down 18.9 and 19.2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.gpu.handover import _fixed, _later_biases, _read, _start_later, _wait
from teal_kernels.gpu.products import _sum_int8, _words
from teal_kernels.gpu.tiles import Matrix, Tile, _accumulate, _columns, _fetch_ahead, _first_bias

# Rows of small tables, aligned or not by layer: one compilation serves all layers.
_ROWS_OF_TABLES = ["thresholds_ptr", "kept_ptr", "scale_ptr"]


@triton.jit
def _inverse_rms(
    h_ptr,
    scale_ptr,
    eps,
    H,
    BLOCK_H: tl.constexpr,
    PROGRAMS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """1 / rms(h): taken by each of the programs that start together, then read by the others.

    scale is 0 until one of the first has written it; whoever finds it so takes it too.
    """
    pid = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    scale = 0.0
    if pid >= PROGRAMS:
        # Not from L1, which may hold the 0.
        if THREADS == 32:
            scale = tl.load(scale_ptr, cache_modifier=".cg")
        else:
            # By one thread for all: it may be written in between, and warps that found it at
            # different times would part ways.
            offs = tl.arange(0, THREADS)
            found = tl.load(scale_ptr + offs, mask=offs == 0, other=0.0, cache_modifier=".cg")
            scale = tl.sum(found, axis=0)
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
    later_ptr,
    later_bias_ptr,
    later_size,
    H,
    stride,
    scales,
    LATER: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """h [H] float32 = the token's row of embed [V, H], scaled; the norms' scales are cleared."""
    _wait(PDL)
    # After the wait: what stands before a step may have set new ones.
    offs_later, biases = _later_biases(later_bias_ptr, later_size, LATER)
    _start_later(later_ptr, offs_later, biases, later_size)
    if tl.program_id(0) == 0:
        offs_s = tl.arange(0, BLOCK_S)
        tl.store(scales_ptr + offs_s, tl.zeros((BLOCK_S,), tl.float32), mask=offs_s < scales)
    token = tl.load(token_ptr).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(embed_ptr + token * stride + offs, mask=offs < H, other=0.0).to(tl.float32)
    tl.store(h_ptr + offs, _fixed(h_ptr, row * MULTIPLIER), mask=offs < H)


@triton.jit(do_not_specialize_on_alignment=_ROWS_OF_TABLES)
def norm_project_kernel(
    y_ptr,
    h_ptr,
    scale_ptr,
    norm_ptr,
    w_ptr,
    grid_ptr,
    groups,
    w_scales_ptr,
    thresholds_ptr,
    kept_ptr,
    later_ptr,
    later_bias_ptr,
    later_size,
    eps,
    H,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    STRIDE_K: tl.constexpr,
    GROUP: tl.constexpr,
    LATER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    THREADS: tl.constexpr,
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
    _fetch_ahead(w_ptr, row, H, start, end, STRIDE_K, AHEAD, PROGRAMS, BLOCK_N)
    gain = tl.load(norm_ptr + offs_k, mask=offs_k < H, other=0.0)
    if LATER > 0:
        offs_later, biases = _later_biases(later_bias_ptr, later_size, LATER)
    _wait(PDL)
    if LATER > 0:
        _start_later(later_ptr, offs_later, biases, later_size)
    if row < H:  # always; see the module's docstring
        h = _read(h_ptr + offs_k, offs_k < H)
        x = h * gain * _inverse_rms(h_ptr, scale_ptr, eps, H, BLOCK_H, PROGRAMS, THREADS)
        first = (start == 0) | (start == N0) | (start == N0 + N1)
        WORDS: tl.constexpr = _words(GROUP, BLOCK_N, N0, N1)
        _accumulate(
            y_ptr, x, Matrix(w_ptr, grid_ptr, groups, w_scales_ptr, STRIDE_K, GROUP),
            Tile(BLOCK_K, BLOCK_N, SLOTS, MORE), threshold, kept_ptr + block, first,
            row, offs_k < H, start, end, WORDS, None, 1.0,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_ROWS_OF_TABLES[:2])
def activate_project_kernel(
    y_ptr,
    gate_up_ptr,
    w_ptr,
    grid_ptr,
    groups,
    w_scales_ptr,
    bias_ptr,
    thresholds_ptr,
    kept_ptr,
    INNER,
    N,
    MULTIPLIER: tl.constexpr,
    STRIDE_K: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    MORE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y += the multiple of a sparse projection of silu(gate) * up; gate_up [2 * INNER] float32."""
    start = tl.program_id(0) * BLOCK_N
    row = tl.program_id(1) * BLOCK_K
    offs_k = row + tl.arange(0, BLOCK_K)
    threshold = tl.load(thresholds_ptr)
    _fetch_ahead(w_ptr, row, INNER, start, N, STRIDE_K, AHEAD, PROGRAMS, BLOCK_N)
    bias = _first_bias(bias_ptr, row, start, N, BLOCK_N, GROUP)
    _wait(PDL)
    if row < INNER:  # always; see the module's docstring
        x = _activated(gate_up_ptr, offs_k, INNER)
        _accumulate(
            y_ptr, x, Matrix(w_ptr, grid_ptr, groups, w_scales_ptr, STRIDE_K, GROUP),
            Tile(BLOCK_K, BLOCK_N, SLOTS, MORE), threshold, kept_ptr, start == 0,
            row, offs_k < INNER, start, N, _words(GROUP, BLOCK_N, 0, 0), bias, MULTIPLIER,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_ROWS_OF_TABLES[:2])
def combine_project_kernel(
    y_ptr,
    parts_ptr,
    maxima_ptr,
    sums_ptr,
    position_ptr,
    w_ptr,
    grid_ptr,
    groups,
    w_scales_ptr,
    bias_ptr,
    thresholds_ptr,
    kept_ptr,
    later_ptr,
    later_bias_ptr,
    later_size,
    N,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    STRIDE_K: tl.constexpr,
    GROUP: tl.constexpr,
    LATER: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    MORE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y += the multiple of a sparse projection of the attention's output, made of its splits.

    parts [splits, HEADS * HEAD_DIM], maxima and sums [splits, HEADS], all float32; only the splits
    that hold visible positions are read.
    """
    K: tl.constexpr = HEADS * HEAD_DIM
    start = tl.program_id(0) * BLOCK_N
    row = tl.program_id(1) * BLOCK_K
    offs_k = row + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    _fetch_ahead(w_ptr, row, K, start, N, STRIDE_K, AHEAD, PROGRAMS, BLOCK_N)
    threshold = tl.load(thresholds_ptr)
    position = tl.load(position_ptr)
    first = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    offs_s = tl.arange(0, SPLITS)
    seen = (offs_s * CHUNK <= position) & (offs_s * CHUNK + CHUNK > first)
    if HEAD_DIM % BLOCK_K == 0:
        head = row // HEAD_DIM + tl.zeros((1,), tl.int32)  # one for the whole tile
    else:
        head = offs_k // HEAD_DIM
    mask_h = head < HEADS
    heads = offs_s[:, None] * HEADS + head[None, :]
    mask_sh = seen[:, None] & mask_h[None, :]
    bias = _first_bias(bias_ptr, row, start, N, BLOCK_N, GROUP)
    offs_later, biases = _later_biases(later_bias_ptr, later_size, LATER)
    _wait(PDL)
    _start_later(later_ptr, offs_later, biases, later_size)
    if row < K:  # always; see the module's docstring
        maxima = tl.load(maxima_ptr + heads, mask=mask_sh, other=float("-inf"))
        sums = tl.load(sums_ptr + heads, mask=mask_sh, other=0.0)
        mask_sk = seen[:, None] & mask_k[None, :]
        parts = tl.load(parts_ptr + offs_s[:, None] * K + offs_k[None, :], mask=mask_sk, other=0.0)
        top = tl.where(mask_h, tl.max(maxima, axis=0), 0.0)
        share = tl.exp(maxima - top[None, :])
        total = tl.where(mask_h, tl.sum(share * sums, axis=0), 1.0)
        x = tl.sum(share * parts, axis=0) / total
        _accumulate(
            y_ptr, x, Matrix(w_ptr, grid_ptr, groups, w_scales_ptr, STRIDE_K, GROUP),
            Tile(BLOCK_K, BLOCK_N, SLOTS, MORE), threshold, kept_ptr, start == 0,
            row, mask_k, start, N, _words(GROUP, BLOCK_N, 0, 0), bias, MULTIPLIER,
        )  # fmt: skip


@triton.jit
def _normed_quarter(h_ptr, norm_ptr, offs, mask, INDEX: tl.constexpr):
    """Of every fourth element of h from INDEX on: the sum of squares, and each times its gain."""
    h = _read(h_ptr + 4 * offs + INDEX, mask)
    gain = tl.load(norm_ptr + 4 * offs + INDEX, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(h * h, axis=0), (h * gain)[None, :]


@triton.jit
def logits_kernel(
    logits_ptr,
    h_ptr,
    norm_ptr,
    w_ptr,
    scales_ptr,
    eps,
    H,
    V,
    stride_wv,
    MULTIPLIER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits [V] float32 = the multiple of lm_head [V, H] times rms_norm(h).

    With scales [V] the lm_head is int8 in words of 4, and H and BLOCK_H count words.
    """
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_h = tl.arange(0, BLOCK_H)
    mask_v = offs_v < V
    mask_h = offs_h < H
    rows = w_ptr + offs_v.to(tl.int64)[:, None] * stride_wv
    w = tl.load(
        rows + offs_h[None, :],
        mask=mask_v[:, None] & mask_h[None, :],
        other=0,
        eviction_policy="evict_first",
    )
    if scales_ptr is None:
        gain = tl.load(norm_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        _wait(PDL)
        h = _read(h_ptr + offs_h, mask_h)
        scale = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / H + eps)
        logits = tl.sum(w.to(tl.float32) * (h * scale * gain)[None, :], axis=1)
    else:
        _wait(PDL)
        square_0, x0 = _normed_quarter(h_ptr, norm_ptr, offs_h, mask_h, 0)
        square_1, x1 = _normed_quarter(h_ptr, norm_ptr, offs_h, mask_h, 1)
        square_2, x2 = _normed_quarter(h_ptr, norm_ptr, offs_h, mask_h, 2)
        square_3, x3 = _normed_quarter(h_ptr, norm_ptr, offs_h, mask_h, 3)
        square = (square_0 + square_1 + square_2 + square_3) / (4 * H)
        logits = _sum_int8(x0, x1, x2, x3, w.to(tl.uint32, bitcast=True))
        scales = tl.load(scales_ptr + offs_v, mask=mask_v, other=0.0)
        logits *= scales / tl.sqrt(square + eps)
    tl.store(logits_ptr + offs_v, logits * MULTIPLIER, mask=mask_v)
