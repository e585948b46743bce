"""Codes of INT8 and INT4 on x86's matrix units (AMX), which multiply bytes and add in int32.

Inputs are handed to them as fixed-point numbers of 16 bits, 256 times a signed byte plus an
unsigned one, so that a product is two of theirs. Columns are taken by chunks, as four tiles of SIDE
columns in an order of their own, which `settle` undoes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal_kernels.cpu.amx import SIDE, move
from teal_kernels.cpu.vectors import (
    CONTRACT,
    F32,
    I8,
    I16,
    I32,
    I64,
    bits_of,
    by_width,
    call,
    constant,
    fetch,
    indices,
    load_vector,
    many,
    offset_of,
    splat,
    store_vector,
    suffix,
)

# Columns of a chunk; inputs that one instruction sums up, four of them a lane; bytes of a tile.
CHUNK, STEP = 64, 64
TILE = SIDE * STEP
# Taken from a code of INT4, so that what is lost of an input counts half as much.
CENTRE = 8
_ROUND = 1.5 * 2**23  # added to a number, it leaves the nearest integer in the lowest bits


def _load(builder: Any, address: Any, element: Any, count: int) -> Any:
    loaded = builder.load(builder.inttoptr(address, many(element, count).as_pointer()))
    loaded.align = 1
    return loaded


def _interleaved(builder: Any, a: Any, b: Any, half: int) -> Any:
    """IR: one half of each 16 bytes, elements of `a` and of `b` by turns; x86's `vpunpck`."""
    count, size = a.type.count, 128 // a.type.element.width
    turns = [
        start + size // 2 * half + i // 2 + count * (i % 2)
        for start in range(0, count, size)
        for i in range(size)
    ]
    return builder.shuffle_vector(a, b, indices(turns))


def _four_rows(builder: Any, rows: list[Any]) -> list[Any]:
    """IR: four rows of bytes → four vectors, in which a column's four bytes lie side by side.

    The jth holds bytes 4 * j to 4 * j + 3 of each 16.
    """
    words = many(I16, rows[0].type.count // 2)
    found = []
    for half in range(2):
        upper, lower = (
            builder.bitcast(_interleaved(builder, pair[0], pair[1], half), words)
            for pair in (rows[:2], rows[2:])
        )
        found += [_interleaved(builder, upper, lower, i) for i in range(2)]
    return [builder.bitcast(vector, rows[0].type) for vector in found]


@intrinsic
def interleave(
    typingctx: Any, dtype: Any, row: Any, stride: Any, first: Any, chunks: Any, ahead: Any, to: Any,
    tile: Any,
) -> Any:  # fmt: skip
    """Store the codes of four rows as `multiply_codes` reads them, chunks from a column on.

    Those of INT4 are less CENTRE.

    row, stride: address of the first, and bytes to the next one.
    ahead: bytes to a row that is fetched meanwhile.
    tile: bytes from a tile to the next.
    """
    kind = dtype.instance_type
    size = CHUNK * bits_of(kind) // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, row, stride, first, chunks, ahead, to, tile = args
        start = offset_of(builder, row, kind, first)
        starts = [builder.add(start, builder.mul(stride, I64(i))) for i in range(4)]
        with cgutils.for_range(builder, chunks) as loop:
            at = builder.mul(loop.index, I64(size))
            for start in starts:
                fetch(builder, builder.add(builder.add(start, at), ahead))
            rows = [_load(builder, builder.add(start, at), I8, size) for start in starts]
            chunk = builder.add(to, builder.mul(builder.mul(tile, I64(4)), loop.index))
            for j, vector in enumerate(_four_rows(builder, rows)):
                if kind == types.int8:
                    store_vector(builder, vector, builder.add(chunk, builder.mul(tile, I64(j))))
                    continue
                pair = (
                    builder.and_(vector, constant(vector.type, 15)),
                    builder.lshr(vector, constant(vector.type, 4)),
                )
                for odd, codes in enumerate(pair):
                    place = builder.add(chunk, builder.mul(tile, I64(j // 2 * 2 + odd)))
                    centred = builder.sub(codes, constant(vector.type, CENTRE))
                    store_vector(builder, centred, builder.add(place, I64(size * (j % 2))))
        return context.get_dummy_value()

    return types.void(dtype, *[types.int64] * 7), codegen


def place_of(packed: bool, column: int) -> tuple[int, int]:
    """Which of a chunk's four tiles holds a column, and where among its SIDE columns.

    packed: whether two codes share a byte.
    """
    if not packed:
        return column % 16 // 4, column // 16 * 4 + column % 4
    byte = column // 2
    return byte % 16 // 8 * 2 + column % 2, byte % 8 // 4 * 8 + byte // 16 * 4 + byte % 4


@intrinsic
def largest_of(typingctx: Any, x: Any, count: Any) -> Any:
    """The largest size among `count` float32 at an address; NaN if it is among them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, count = args
        found = [cgutils.alloca_once_value(builder, constant(many(I32, w), 0)) for w in (64, 1)]

        def take(index: Any, width: int) -> None:
            at = builder.add(x, builder.mul(index, I64(4)))
            bits = builder.and_(
                _load(builder, at, I32, width), constant(many(I32, width), 2**31 - 1)
            )
            top = found[width == 1]
            # As integers: the bits of NaN are above all others.
            kept = builder.load(top)
            more = builder.icmp_unsigned(">", bits, kept)
            builder.store(builder.select(more, bits, kept), top)

        by_width(builder, count, (64, 1), take)
        wide, one = map(builder.load, found)
        top = call(builder, "llvm.vector.reduce.umax.v64i32", I32, [wide])
        top = builder.select(builder.icmp_unsigned(">", top, one), top, one)
        return builder.bitcast(top, F32)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def raise_to(typingctx: Any, values: Any, count: Any, to: Any) -> Any:
    """`count` float32 at `to` become the sizes of float16 at an address where those are larger."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, count, to = args

        def take(index: Any, width: int) -> None:
            at, place = (
                builder.add(base, builder.mul(index, I64(size)))
                for base, size in ((values, 2), (to, 4))
            )
            found = load_vector(builder, at, types.float16, width)
            found = call(builder, f"llvm.fabs.{suffix(width)}", found.type, [found])
            before = load_vector(builder, place, types.float32, width)
            more = builder.fcmp_ordered(">", found, before)
            store_vector(builder, builder.select(more, found, before), place)

        by_width(builder, count, (16, 4, 1), take)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def to_fixed(typingctx: Any, dtype: Any, x: Any, each: Any, steps: Any, to: Any, low: Any) -> Any:
    """Store x times `each`, rounded to 16 bits, for `steps` times STEP float32 of a token.

    For INT8 the signed bytes go to the token's row of tiles, the unsigned ones `low` bytes further;
    for INT4 both stay together, in rows twice as long.
    """
    words = dtype.instance_type == types.uint8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, x, each, steps, to, low = args
        floats, ints = many(F32, STEP), many(I32, STEP)
        with cgutils.for_range(builder, steps) as loop:
            at = builder.add(x, builder.mul(loop.index, I64(4 * STEP)))
            product = builder.fmul(
                load_vector(builder, at, types.float32, STEP),
                splat(builder, each, STEP), flags=CONTRACT,
            )  # fmt: skip
            shifted = builder.fadd(product, constant(floats, _ROUND), flags=CONTRACT)
            fixed = builder.bitcast(shifted, ints)
            target = builder.add(to, builder.mul(loop.index, I64(TILE * (1 + words))))
            if words:
                store_vector(builder, builder.trunc(fixed, many(I16, STEP)), target)
            else:
                high = builder.lshr(fixed, constant(ints, 8))
                store_vector(builder, builder.trunc(high, many(I8, STEP)), target)
                place = builder.add(target, low)
                store_vector(builder, builder.trunc(fixed, many(I8, STEP)), place)
        return context.get_dummy_value()

    signature = types.void(dtype, types.int64, types.float32, types.int64, types.int64, types.int64)
    return signature, codegen


@intrinsic
def scale_tiles(typingctx: Any, words: Any, factors: Any, rows: Any, steps: Any, to: Any) -> Any:
    """Store a tile's inputs times factors, both fixed-point of 16 bits, as two tiles a step.

    words: address of int16 [steps, SIDE, STEP].
    factors: address of int16 [steps, STEP].
    rows: of each tile.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words, factors, rows, steps, to = args
        half = many(I16, 32)
        with cgutils.for_range(builder, steps) as step:
            at = builder.add(factors, builder.mul(step.index, I64(2 * STEP)))
            weighs = [_load(builder, builder.add(at, I64(64 * i)), I16, 32) for i in range(2)]
            start = builder.mul(step.index, I64(2 * TILE))
            with cgutils.for_range(builder, rows) as row:
                at = builder.add(words, start)
                at = builder.add(at, builder.mul(row.index, I64(2 * STEP)))
                products = []
                for i, weigh in enumerate(weighs):
                    values = _load(builder, builder.add(at, I64(64 * i)), I16, 32)
                    name = "llvm.x86.avx512.pmul.hr.sw.512"
                    product = call(builder, name, half, [values, weigh])
                    products.append(builder.bitcast(product, many(I8, 64)))
                target = builder.add(builder.add(to, start), builder.mul(row.index, I64(STEP)))
                for part, place in ((1, target), (0, builder.add(target, I64(TILE)))):
                    turns = indices(range(part, 2 * STEP, 2))
                    store_vector(builder, builder.shuffle_vector(*products, turns), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def multiply_codes(
    typingctx: Any, x: Any, low: Any, x_step: Any, codes: Any, tile: Any, steps: Any, to: Any
) -> Any:
    """Four tiles of int32 at `to` = signed and unsigned bytes of SIDE tokens times two tiles.

    x, low, x_step: address of the signed bytes, bytes to the unsigned ones and to the next step.
    codes, tile: address of the first tile [steps, SIDE, 4 * SIDE], and bytes to the second.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, low, x_step, codes, tile, steps, to = args
        for i in range(4):
            call(builder, "llvm.x86.tilezero", ir.VoidType(), [I8(i)])
        with cgutils.for_range(builder, steps) as loop:
            values = builder.add(x, builder.mul(loop.index, x_step))
            weights = builder.add(codes, builder.mul(loop.index, I64(TILE)))
            for i, at in enumerate((values, builder.add(values, low))):
                move(builder, "tileloadd", 4 + i, at, I64(STEP))
            for j, at in enumerate((weights, builder.add(weights, tile))):
                move(builder, "tileloadd", 6 + j, at, I64(64))
            for i, name in enumerate(("tdpbssd", "tdpbusd")):
                for j in range(2):
                    operands = [I8(2 * i + j), I8(4 + i), I8(6 + j)]
                    call(builder, f"llvm.x86.{name}", ir.VoidType(), operands)
        for i in range(4):
            move(builder, "tilestored", i, builder.add(to, I64(TILE * i)), I64(64))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def settle(
    typingctx: Any, dtype: Any, sums: Any, rows: Any, scales: Any, factor: Any, pair: Any, to: Any,
    to_step: Any,
) -> Any:  # fmt: skip
    """to[t] += scales[t] * factor * what `multiply_codes` left at `sums`, for `rows` tokens.

    pair: which half of a chunk's tiles it is, 0 or 1.
    to, to_step: address of a chunk's float32, and bytes to the next token.
    """
    packed = dtype.instance_type == types.uint8
    # The columns of the first pair; those of the second follow them run by run.
    columns = [column for column in range(CHUNK) if place_of(packed, column)[0] < 2]
    run = next(i for i in range(1, CHUNK) if columns[i] != columns[0] + i)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, sums, rows, scales, factor, pair, to, to_step = args
        start = builder.add(to, builder.mul(pair, I64(4 * run)))
        floats = many(F32, SIDE)
        with cgutils.for_range(builder, rows) as loop:
            at = builder.add(sums, builder.mul(loop.index, I64(4 * SIDE)))
            found = [_load(builder, builder.add(at, I64(TILE * i)), I32, SIDE) for i in range(4)]
            scale = builder.add(scales, builder.mul(loop.index, I64(4)))
            scale = builder.fmul(load_vector(builder, scale, types.float32, 1), factor)
            row = builder.add(start, builder.mul(loop.index, to_step))
            values = []
            for high, low in zip(found[:2], found[2:], strict=True):
                whole = builder.add(builder.shl(high, constant(high.type, 8)), low)
                value = builder.sitofp(whole, floats)
                values.append(builder.fmul(value, splat(builder, scale, SIDE), flags=CONTRACT))
            for i in range(0, len(columns), run):
                places = [place_of(packed, column) for column in columns[i : i + run]]
                turns = indices(tile * SIDE + at for tile, at in places)
                added = builder.shuffle_vector(*values, turns)
                target = builder.add(row, I64(4 * columns[i]))
                before = load_vector(builder, target, types.float32, run)
                store_vector(builder, builder.fadd(before, added, flags=CONTRACT), target)
        return context.get_dummy_value()

    signature = types.void(
        dtype, types.int64, types.int64, types.int64, types.float32, *[types.int64] * 3
    )
    return signature, codegen
