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
    call,
    constant,
    indices,
    load_as,
    load_vector,
    many,
    offset_of,
    splat,
    store_vector,
)

# Columns of a chunk; inputs that one instruction sums up, four of them a lane; bytes of a tile.
CHUNK, STEP = 64, 64
TILE = SIDE * STEP
# Taken from a code of INT4, so that what is lost of an input counts half as much; and what it is
# then multiplied with, as the upper one of a byte stands there.
CENTRE, UPPER = 8, 16


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
    typingctx: Any, dtype: Any, row: Any, stride: Any, fours: Any, first: Any, chunks: Any, to: Any,
    tile: Any,
) -> Any:  # fmt: skip
    """Store the codes of `fours` times four rows, chunks from a column on, for `multiply_codes`.

    Those of INT4 are less CENTRE, times UPPER.

    row, stride: address of the first, and bytes to the next one.
    tile: bytes from a tile to the next.
    """
    kind = dtype.instance_type
    size = CHUNK * bits_of(kind) // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, row, stride, fours, first, chunks, to, tile = args
        start = offset_of(builder, row, kind, first)
        four = builder.mul(stride, I64(4))
        with (
            cgutils.for_range(builder, fours) as rows,
            cgutils.for_range(builder, chunks) as loop,
        ):
            at = builder.add(builder.mul(rows.index, four), builder.mul(loop.index, I64(size)))
            at = builder.add(start, at)
            starts = [builder.add(at, builder.mul(stride, I64(i))) for i in range(4)]
            vectors = _four_rows(builder, [load_as(builder, begin, I8, size) for begin in starts])
            chunk = builder.add(to, builder.mul(builder.mul(tile, I64(4)), loop.index))
            chunk = builder.add(chunk, builder.mul(rows.index, I64(64)))
            for j, vector in enumerate(vectors):
                if kind == types.int8:
                    store_vector(builder, vector, builder.add(chunk, builder.mul(tile, I64(j))))
                    continue
                words = builder.bitcast(vector, many(I16, size // 2))
                low = builder.bitcast(builder.shl(words, constant(words.type, 4)), vector.type)
                for odd, codes in enumerate((low, vector)):
                    place = builder.add(chunk, builder.mul(tile, I64(j // 2 * 2 + odd)))
                    upper = builder.and_(codes, constant(codes.type, 0xF0))
                    # An exclusive or with 8 is a subtraction of 8, in four bits with a sign.
                    centred = builder.xor(upper, constant(codes.type, CENTRE * UPPER))
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
            found = [load_as(builder, builder.add(at, I64(TILE * i)), I32, SIDE) for i in range(4)]
            scale = builder.add(scales, builder.mul(loop.index, I64(4)))
            scale = builder.fmul(load_vector(builder, scale, types.float32, 1), factor)
            row = builder.add(start, builder.mul(loop.index, to_step))
            values = []
            for high, low in zip(found[:2], found[2:], strict=True):
                upper, value = (builder.sitofp(part, floats) for part in (high, low))
                upper = builder.fmul(upper, constant(floats, 256.0), flags=CONTRACT)
                value = builder.fadd(upper, value, flags=CONTRACT)
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
