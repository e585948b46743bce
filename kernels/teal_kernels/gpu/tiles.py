# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""One program's tile of a projection: its columns, the rows that survive, their product."""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.gpu.handover import _add
from teal_kernels.gpu.projection import INTERPRETED

_COMPILED = tl.constexpr(not INTERPRETED)
# Factors before and after a product with integers: see `_integers`.
_LARGE = tl.constexpr(2.0**96)
_UNITS = tl.constexpr(2.0**53)


@triton.constexpr_function
def _pack(group):
    """Columns in a stored element: integers are read in words of 32 bits."""
    return 1 if group < 0 else 8 if group else 4


@triton.constexpr_function
def _words(group, block_n, n0, n1):
    """Words of an int4 row that share a scale in every tile, wherever it starts."""
    sizes = (group // 8, 4, 1) if group > 0 else (1,)
    return next(size for size in sizes if not (block_n % size or n0 % size or n1 % size))


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
def _integers(words, MASK: tl.constexpr):
    """What MASK leaves of words, an integer n below 2^24, as the float32 n * 2^-149.

    Such numbers are subnormal or nearly so: their bits are the integer itself. Multiplication takes
    them at full speed and exactly, and conversion, which is slow, is not needed. To keep products
    normal the other factor is large by _LARGE; sums of products are then in units of _UNITS.
    """
    return (words & MASK).to(tl.float32, bitcast=True)


@triton.jit
def _field(x, words, MASK: tl.constexpr, ONE: tl.constexpr):
    """Sum over rows of x, large, times the integers that MASK leaves of words, in units of ONE."""
    return tl.sum(x * _integers(words, MASK), axis=0) * (_UNITS / ONE)


@triton.jit
def _sum_int8(x0, x1, x2, x3, words):
    """Sum over columns of the four bytes of words [R, C] times x0 to x3 [1, C]: [R]."""
    words ^= 0x80808080  # from signed to 128 more
    y = x0 * _LARGE * _integers(words, 0xFF) + x3 * _LARGE * _integers(words >> 24, 0xFF)
    y += x1 * (_LARGE / 256) * _integers(words, 0xFF00)
    y += x2 * (_LARGE / 65536) * _integers(words, 0xFF0000)
    return tl.sum(y, axis=1) * _UNITS - 128.0 * tl.sum(x0 + x1 + x2 + x3, axis=1)


@triton.jit
def _load_rows(
    w_ptr,
    grid_ptr,
    groups,
    rows,
    mask,
    start,
    end,
    STRIDE_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Rows of w, each read only where `mask` says so; weights pass through the cache once.

    GROUP is that of `Stored`; start, end and BLOCK_N count stored elements. Of int4 a scale and an
    offset come with every WORDS of them; of the others, nothing that is used.
    """
    offs = rows.to(tl.int64)[:, None] * STRIDE_K
    offs_n = start + tl.arange(0, BLOCK_N)
    inside = mask[:, None] & (offs_n < end)[None, :]
    w = tl.load(w_ptr + offs + offs_n[None, :], mask=inside, other=0, eviction_policy="evict_first")
    if GROUP <= 0:
        return w, w, w
    else:  # noqa: RET505 - what follows a return is compiled otherwise
        offs_g = start // WORDS + tl.arange(0, BLOCK_N // WORDS)
        inside = mask[:, None] & (offs_g * WORDS < end)[None, :]
        grid = grid_ptr + 2 * offs + (offs_g // (GROUP // 8 // WORDS))[None, :]
        scales = tl.load(grid, mask=inside, other=0.0)
        return w, scales, tl.load(grid + groups, mask=inside, other=0.0)


@triton.jit
def _repeated(x, TIMES: tl.constexpr):
    """Every element of the last axis so many times in a row."""
    if len(x.shape) == 1:
        SHAPE: tl.constexpr = (x.shape[0], TIMES)
        x = tl.reshape(tl.broadcast_to(x[:, None], SHAPE), (x.shape[0] * TIMES,))
    else:
        SHAPE_2: tl.constexpr = (x.shape[0], x.shape[1], TIMES)
        wide = tl.broadcast_to(x[:, :, None], SHAPE_2)
        x = tl.reshape(wide, (x.shape[0], x.shape[1] * TIMES))
    return x


@triton.jit
def _multiply_int8(x, words):
    """Sum over rows of x [R] times the bytes of words [R, C], in their order: [4 * C]."""
    words ^= 0x80808080  # from signed to 128 more
    large = (x * _LARGE)[:, None]
    even = tl.join(_field(large, words, 0xFF, 1), _field(large, words, 0xFF0000, 1 << 16))
    odd = tl.join(_field(large, words, 0xFF00, 1 << 8), _field(large, words >> 24, 0xFF, 1))
    y = tl.join(even, odd) - 128.0 * tl.sum(x, axis=0)
    return tl.reshape(y, (4 * words.shape[1],))


@triton.jit
def _times_pair(x, y):
    """Products of the two float16 in each of x and y, uint32."""
    return tl.inline_asm_elementwise(
        "mul.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _plus_pair(x, y):
    """Sums of the two float16 in each of x and y, uint32; after a product one instruction."""
    return tl.inline_asm_elementwise(
        "add.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _plus_pairs(a0, a1, a2, a3, b0, b1, b2, b3):
    return _plus_pair(a0, b0), _plus_pair(a1, b1), _plus_pair(a2, b2), _plus_pair(a3, b3)


@triton.jit
def _split_pair(pair):
    """The two float16 in each of pair, as float32: side by side in a new last axis."""
    low = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    high = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low.to(tl.float32), high.to(tl.float32))


@triton.jit
def _sum_codes(x, words):
    """For the interpreter: sums over rows of x float16 times two codes of words, as a pair."""
    low = tl.sum(x.to(tl.float32) * (words & 0xF).to(tl.float32), axis=0) * 2.0**-24
    high = tl.sum(x.to(tl.float32) * ((words >> 16) & 0xF).to(tl.float32), axis=0) * 2.0**-24
    low = low.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | (high.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def _multiply_int4(x, words, scales, offsets, WORDS: tl.constexpr):
    """Sum over rows of x [R] times the weights in words [R, C], in their order: [8 * C].

    Each of the 8 codes in a word is times scales and plus offsets [R, C / WORDS].

    A code n, masked in place, is as the bits of a float16 the subnormal number n * 2^-24, or 16
    times that: two codes are multiplied and added by one instruction. For products of normal size
    each group's x is scaled by a power of two, to at most 2^15; a tile's sums keep 11 bits.
    """
    scaled = x[:, None] * scales.to(tl.float32)
    exponent = tl.max(tl.abs(scaled), axis=0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 15), 240)
    # As bits of float32: 2^(141 - exponent), and 2^24 over that, what the sums are in units of.
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    units = ((exponent + 10) << 23).to(tl.float32, bitcast=True)
    large = scaled * up[None, :]
    if _COMPILED:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,f", [large], dtype=tl.uint32, is_pure=True, pack=1
        )
        pair = _repeated(pair, WORDS)
        sixteenth = _times_pair(pair, 0x2C002C00)  # twice 1 / 16
        upper = words >> 8
        products = (
            _times_pair(pair, words & 0x000F000F),
            _times_pair(sixteenth, words & 0x00F000F0),
            _times_pair(pair, upper & 0x000F000F),
            _times_pair(sixteenth, upper & 0x00F000F0),
        )
        y0, y1, y2, y3 = tl.reduce(products, 0, _plus_pairs)
    else:
        wide = _repeated(large.to(tl.float16), WORDS)
        y0, y1 = _sum_codes(wide, words), _sum_codes(wide, words >> 4)
        y2, y3 = _sum_codes(wide, words >> 8), _sum_codes(wide, words >> 12)
    y02 = tl.join(_split_pair(y0), _split_pair(y2))
    y13 = tl.join(_split_pair(y1), _split_pair(y3))
    units = _repeated(units, WORDS)
    offset = _repeated(tl.sum(x[:, None] * offsets.to(tl.float32), axis=0), WORDS)
    y = tl.join(y02, y13) * units[:, None, None, None] + offset[:, None, None, None]
    return tl.reshape(y, (8 * words.shape[1],))


@triton.jit
def _multiply(x, tile, GROUP: tl.constexpr, WORDS: tl.constexpr):
    """Sum over rows of x times the weights that `_load_rows` gave; columns are not scaled yet."""
    if GROUP < 0:
        y = tl.sum(x[:, None] * tile[0].to(tl.float32), axis=0)
    elif GROUP == 0:
        y = _multiply_int8(x, tile[0].to(tl.uint32, bitcast=True))
    else:
        y = _multiply_int4(x, tile[0].to(tl.uint32, bitcast=True), tile[1], tile[2], WORDS)
    return y


@triton.jit
def _gather(x, bits, counts, row, first, SLOTS: tl.constexpr):
    """The survivors from `first` on, SLOTS of every 32 channels: their x, row, and existence."""
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
    return values, rows, tl.reshape(there, (GROUPS * SLOTS,))


@triton.jit
def _accumulate(
    y_ptr,
    x,
    w_ptr,
    grid_ptr,
    groups,
    w_scales_ptr,
    threshold,
    kept_ptr,
    count,
    row,
    mask_k,
    start,
    end,
    STRIDE_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    MORE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Add one tile's product to y; channels with abs(x) <= threshold are never loaded.

    NaN is not dropped, so that it reaches the logits and is noticed there.

    With SLOTS the survivors are found first, and the tile is of them alone: SLOTS + MORE of every
    32 channels at once, and in a loop those beyond.
    """
    keep = ~(tl.abs(x) <= threshold) & mask_k
    if SLOTS == 0:
        kept = tl.sum(keep.to(tl.int32), axis=0)
        w = _load_rows(
            w_ptr, grid_ptr, groups, row + tl.arange(0, BLOCK_K), keep, start, end, STRIDE_K,
            GROUP, BLOCK_N, WORDS,
        )  # fmt: skip
        y = _multiply(tl.where(keep, x, 0.0), w, GROUP, WORDS)
    else:
        GROUPS: tl.constexpr = BLOCK_K // 32
        keep = tl.reshape(keep, (GROUPS, 32)).to(tl.uint32)
        x = tl.reshape(x, (GROUPS, 32))
        bits = tl.sum(keep << tl.arange(0, 32)[None, :].to(tl.uint32), axis=1)
        counts = _count_bits(bits).to(tl.int32)
        kept = tl.sum(counts, axis=0)
        x1, rows1, there1 = _gather(x, bits, counts, row, 0, SLOTS)
        w1 = _load_rows(
            w_ptr, grid_ptr, groups, rows1, there1, start, end, STRIDE_K, GROUP, BLOCK_N, WORDS
        )
        if MORE > 0:
            x2, rows2, there2 = _gather(x, bits, counts, row, SLOTS, MORE)
            w2 = _load_rows(
                w_ptr, grid_ptr, groups, rows2, there2, start, end, STRIDE_K, GROUP, BLOCK_N, WORDS
            )
        y = _multiply(x1, w1, GROUP, WORDS)
        if MORE > 0:
            y += _multiply(x2, w2, GROUP, WORDS)
        most = tl.max(counts, axis=0)
        first = SLOTS + MORE
        while first < most:
            x1, rows1, there1 = _gather(x, bits, counts, row, first, SLOTS)
            w1 = _load_rows(
                w_ptr, grid_ptr, groups, rows1, there1, start, end, STRIDE_K, GROUP, BLOCK_N, WORDS
            )
            y += _multiply(x1, w1, GROUP, WORDS)
            first += SLOTS
    PACK: tl.constexpr = _pack(GROUP)
    offs_n = start * PACK + tl.arange(0, BLOCK_N * PACK)
    mask_n = offs_n < end * PACK
    if GROUP >= 0:
        y *= tl.load(w_scales_ptr + offs_n, mask=mask_n, other=0.0)
    _add(y_ptr + offs_n, y, mask_n)
    if count:
        tl.atomic_add(kept_ptr, kept, sem="relaxed")
