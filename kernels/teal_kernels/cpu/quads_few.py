"""Rows of INT8 times a few tokens, four products with one instruction, as `quads` does for one.

A block's codes are interleaved once for all tokens, into the first-level cache.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal_kernels.cpu.quads import add_fours, lanes_of, split, transposed, unsigned
from teal_kernels.cpu.tiles import FEW
from teal_kernels.cpu.vectors import (
    CONTRACT,
    F32,
    I8,
    I32,
    I64,
    by_width,
    call,
    constant,
    fetch,
    load_as,
    load_vector,
    many,
    splat,
    store_vector,
)

# Rows of a block, whose inputs share a step, and the bytes that a token's inputs become: high
# parts, low ones, what 128 adds to all codes, the step. More rows, and those that follow, are too
# many lines for the first-level cache; of fewer the sums are brought to scale too often.
BLOCK_ROWS, INPUT_BYTES = 16, 64
_LINE = 64


@intrinsic
def split_rows(typingctx: Any, x: Any, to: Any) -> Any:
    """Write what `add_few` takes of BLOCK_ROWS float32 at an address to another one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, to = args
        high, low, step = split(builder, load_as(builder, x, F32, BLOCK_ROWS))
        wide, name = many(I32, BLOCK_ROWS), f"llvm.vector.reduce.add.v{BLOCK_ROWS}i32"
        sums = [call(builder, name, I32, [builder.sext(part, wide)]) for part in (high, low)]
        total = builder.add(builder.mul(sums[0], I32(256)), sums[1])
        parts = high, low, builder.mul(total, I32(-128)), step
        for at, part in zip(
            (0, BLOCK_ROWS, 2 * BLOCK_ROWS, 2 * BLOCK_ROWS + 4), parts, strict=True
        ):
            store_vector(builder, part, builder.add(to, I64(at)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _adding(tokens: int) -> Any:
    """The intrinsic for that many tokens."""

    @intrinsic
    def add_few(
        typingctx: Any, row: Any, stride: Any, following: Any, columns: Any, inputs: Any,
        to: Any, to_step: Any,
    ) -> Any:  # fmt: skip
        """to[t] += BLOCK_ROWS rows of INT8 times a token's inputs, for `in_quads` columns.

        The sums are in the order of `in_order`.

        row, stride: address of the first, and bytes to the next one.
        following: address of as many rows, which are fetched meanwhile.
        inputs: address of what `split_rows` made, INPUT_BYTES a token.
        to, to_step: address of float32, and bytes to the next token.
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            row, stride, following, columns, inputs, to, to_step = args
            if not lanes_of(context):
                return context.get_dummy_value()
            room = cgutils.alloca_once(builder, ir.ArrayType(I8, BLOCK_ROWS * _LINE))
            room.align = _LINE
            room = builder.ptrtoint(room, I64)
            quads = BLOCK_ROWS // 4
            owns = [builder.add(inputs, I64(INPUT_BYTES * t)) for t in range(tokens)]

            def interleave(column: Any, width: int) -> None:
                """`width` columns as four vectors of four rows' bytes, `quads` of each."""
                start = builder.add(row, column)
                with cgutils.for_range(builder, I64(quads)) as loop:
                    at = builder.add(start, builder.mul(loop.index, builder.mul(stride, I64(4))))
                    codes = [
                        load_as(builder, builder.add(at, builder.mul(stride, I64(i))), I8, width)
                        for i in range(4)
                    ]
                    fours = transposed(builder, [unsigned(builder, code) for code in codes])
                    target = builder.add(room, builder.mul(loop.index, I64(width)))
                    for n, four in enumerate(fours):
                        store_vector(builder, four, builder.add(target, I64(quads * width * n)))

            def add(column: Any, width: int) -> None:
                interleave(column, width)
                lanes = width // 4
                with cgutils.for_range(builder, I64(4)) as loop:
                    codes = builder.add(room, builder.mul(loop.index, I64(quads * width)))
                    sums = multiply(column, codes, loop.index, lanes)
                    start = builder.add(column, builder.mul(loop.index, I64(lanes)))
                    for t, (own, total) in enumerate(zip(owns, sums, strict=True)):
                        target = builder.add(to, builder.mul(to_step, I64(t)))
                        target = builder.add(target, builder.mul(start, I64(4)))
                        place = builder.add(own, I64(2 * BLOCK_ROWS + 4))
                        step = splat(builder, load_as(builder, place, F32, 1), lanes)
                        product = builder.sitofp(total, many(F32, lanes))
                        product = builder.fmul(product, step, flags=CONTRACT)
                        before = load_vector(builder, target, types.float32, lanes)
                        added = builder.fadd(before, product, flags=CONTRACT)
                        store_vector(builder, added, target)

            def multiply(column: Any, codes: Any, vector: Any, lanes: int) -> list[Any]:
                """A vector of columns' sums, in steps, for each token."""
                ints = many(I32, lanes)
                sums = [
                    [cgutils.alloca_once(builder, ints) for _ in range(2)] for _ in range(tokens)
                ]
                for own, (high, low) in zip(owns, sums, strict=True):
                    builder.store(constant(ints, 0), high)
                    start = load_as(builder, builder.add(own, I64(2 * BLOCK_ROWS)), I32, 1)
                    builder.store(splat(builder, start, lanes), low)
                with cgutils.for_range(builder, I64(quads)) as loop:
                    at = builder.add(codes, builder.mul(loop.index, I64(4 * lanes)))
                    four, offset = load_as(builder, at, I32, lanes), builder.mul(loop.index, I64(4))
                    # One line of the rows that follow: all at once would have to wait.
                    line = builder.mul(builder.add(offset, vector), stride)
                    fetch(builder, builder.add(following, builder.add(line, column)))
                    for own, totals in zip(owns, sums, strict=True):
                        for part, total in enumerate(totals):
                            place = builder.add(own, I64(BLOCK_ROWS * part))
                            factor = load_as(builder, builder.add(place, offset), I32, 1)
                            factors = splat(builder, factor, lanes)
                            added = add_fours(builder, builder.load(total), four, factors)
                            builder.store(added, total)
                return [
                    builder.add(
                        builder.shl(builder.load(high), constant(ints, 8)), builder.load(low)
                    )
                    for high, low in sums
                ]

            by_width(builder, columns, [4 * lanes for lanes in lanes_of(context)], add)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return add_few


add_fours_to_2, add_fours_to_5, add_fours_to_8 = map(_adding, (2, 5, FEW))
