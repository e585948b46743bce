# mypy: allow-untyped-defs
# Triton reads annotations of a kernel's parameters as types of its own.
"""Products of one tile with weights that are floats, or integers that are never converted."""

from __future__ import annotations

import triton
import triton.language as tl

from teal_kernels.gpu.handover import INTERPRETED

COMPILED = tl.constexpr(not INTERPRETED)
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
    if COMPILED:
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
