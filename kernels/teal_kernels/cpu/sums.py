"""Sums over several rows of weights, as intrinsics: the loops that read nearly all bytes."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal_kernels.cpu.vectors import (
    BLOCK,
    CONTRACT,
    F32,
    I16,
    I32,
    I64,
    LANES,
    ROWS,
    WIDTH,
    by_width,
    call,
    constant,
    fetch,
    indices,
    load_vector,
    many,
    splat,
    store_vector,
    suffix,
)


def starts_of(builder: Any, rows: Any, at: Any) -> list[Any]:
    """IR: the 2 * ROWS addresses at `rows`, each plus `at`."""
    pointers = (
        builder.inttoptr(builder.add(rows, I64(8 * i)), I64.as_pointer()) for i in range(2 * ROWS)
    )
    return [builder.add(builder.load(pointer), at) for pointer in pointers]


@intrinsic
def add_rows(
    typingctx: Any, dtype: Any, rows: Any, at: Any, factors: Any, count: Any, to: Any
) -> Any:
    """`count` float32 at `to` += the sum of ROWS factors times what is in the rows; not of INT4.

    rows: address of 2 * ROWS addresses; the second half is only fetched into the cache.
    at: bytes from there to the first value.
    factors: address of the float32.
    """
    kind = dtype.instance_type

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, rows, at, factors, count, to = args
        starts = starts_of(builder, rows, at)
        weighs = [
            load_vector(builder, builder.add(factors, I64(4 * i)), types.float32, 1)
            for i in range(ROWS)
        ]

        def add(index: Any, width: int) -> None:
            offset = builder.mul(index, I64(kind.bitwidth // 8))
            target = builder.add(to, builder.mul(index, I64(4)))
            total = load_vector(builder, target, types.float32, width)
            for start, weigh in zip(starts, weighs, strict=False):
                weights = load_vector(builder, builder.add(start, offset), kind, width)
                product = builder.fmul(weights, splat(builder, weigh, width), flags=CONTRACT)
                total = builder.fadd(total, product, flags=CONTRACT)
            for start in starts[ROWS:]:
                fetch(builder, builder.add(start, offset))
            store_vector(builder, total, target)

        by_width(builder, count, (WIDTH, LANES, 1), add)
        return context.get_dummy_value()

    return types.void(dtype, *[types.int64] * 5), codegen


@intrinsic
def scale_factors(
    typingctx: Any,
    rows: Any,
    at: Any,
    factors: Any,
    groups: Any,
    scaled: Any,
    pairs: Any,
    steps: Any,
) -> Any:
    """Multiply ROWS factors with the `groups` float16 scales in each row, as floats and in 16 bits.

    rows, at, factors: as for `add_rows`.
    scaled: address of float32 [ROWS, groups] for the products.
    pairs: address of int32 [ROWS / 2, groups] for the products as multiples of a step, rounded to
        16 bits, two rows in one: the first in the low half.
    steps: address of float32 [groups]: a 32767th of the largest product of a group.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, at, factors, groups, scaled, pairs, steps = args
        starts = starts_of(builder, rows, at)
        weighs = [
            load_vector(builder, builder.add(factors, I64(4 * i)), types.float32, 1)
            for i in range(ROWS)
        ]
        row_bytes = builder.mul(groups, I64(4))

        def scale(index: Any, width: int) -> None:
            floats, ints = many(F32, width), many(I32, width)
            offset = builder.mul(index, I64(4))

            def place(base: Any, row: int) -> Any:
                return builder.add(base, builder.add(builder.mul(row_bytes, I64(row)), offset))

            products, top = [], constant(floats, 1e-30)
            for start in starts[ROWS:]:
                fetch(builder, builder.add(start, builder.mul(index, I64(2))))
            for i, weigh in enumerate(weighs):
                at = builder.add(starts[i], builder.mul(index, I64(2)))
                scales = load_vector(builder, at, types.float16, width)
                products.append(builder.fmul(scales, splat(builder, weigh, width)))
                store_vector(builder, products[-1], place(scaled, i))
                size = call(builder, f"llvm.fabs.{suffix(width)}", floats, [products[-1]])
                top = builder.select(builder.fcmp_ordered(">", size, top), size, top)
            step = builder.fdiv(top, constant(floats, 32767.0))
            store_vector(builder, step, place(steps, 0))
            whole = []
            for product in products:
                multiple = [builder.fdiv(product, step)]
                nearest = call(builder, f"llvm.rint.{suffix(width)}", floats, multiple)
                whole.append(builder.fptosi(nearest, ints))
            for i in range(0, ROWS, 2):
                low = builder.and_(whole[i], constant(ints, 0xFFFF))
                high = builder.shl(whole[i + 1], constant(ints, 16))
                store_vector(builder, builder.or_(low, high), place(pairs, i // 2))

        by_width(builder, groups, (LANES, 1), scale)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def add_codes(
    typingctx: Any, rows: Any, first: Any, group: Any, groups: Any, pairs: Any, steps: Any,
    blocks: Any, to: Any,
) -> Any:  # fmt: skip
    """`blocks` times BLOCK float32 at `to` += the sum of steps * pairs * the rows' INT4 codes.

    Integers are summed, which takes two rows with one instruction where there is one like x86's
    `vpmaddwd`. The sums of a block are in the order of `in_order`.

    rows: as for `add_rows`.
    first, group: the column to start with, and the columns of a group; multiples of BLOCK.
    groups, pairs, steps: as for `scale_factors`.
    """
    dwords, words = many(I32, LANES), many(I16, 2 * LANES)
    wide, floats = many(I32, 2 * LANES), many(F32, LANES)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, first, group, groups, pairs, steps, blocks, to = args
        starts = starts_of(builder, rows, builder.lshr(first, I64(1)))

        def halves(low: Any, high: Any) -> Any:
            """Words of `low` and of `high` by turns."""
            low, high = builder.bitcast(low, words), builder.bitcast(high, words)
            turns = (i + 2 * LANES * (i % 2) for i in range(2 * LANES))
            return builder.shuffle_vector(low, high, indices(turns))

        def multiply_add(codes: Any, factor: Any) -> Any:
            product = builder.mul(builder.sext(codes, wide), builder.sext(factor, wide))
            even = builder.shuffle_vector(product, product, indices(range(0, 2 * LANES, 2)))
            odd = builder.shuffle_vector(product, product, indices(range(1, 2 * LANES, 2)))
            return builder.add(even, odd)

        with cgutils.for_range(builder, blocks) as loop:
            offset = builder.mul(loop.index, I64(BLOCK // 2))
            for start in starts[ROWS:]:
                fetch(builder, builder.add(start, offset))
            column = builder.add(first, builder.mul(loop.index, I64(BLOCK)))
            g = builder.mul(builder.udiv(column, group), I64(4))
            sixteen = constant(dwords, 16)
            totals = [constant(dwords, 0)] * 8
            for i in range(0, ROWS, 2):
                at = builder.add(g, builder.mul(groups, I64(2 * i)))
                pair = load_vector(builder, builder.add(pairs, at), types.uint32, 1)
                factor = builder.bitcast(splat(builder, pair, LANES), words)
                a, b = (
                    load_vector(builder, builder.add(start, offset), types.uint32, LANES)
                    for start in starts[i : i + 2]
                )
                low = halves(a, builder.shl(b, sixteen))
                high = halves(builder.lshr(a, sixteen), b)
                for n in range(8):
                    codes = builder.lshr(high if n > 3 else low, constant(words, 4 * (n % 4)))
                    codes = builder.and_(codes, constant(words, 15))
                    totals[n] = builder.add(totals[n], multiply_add(codes, factor))
            step = load_vector(builder, builder.add(steps, g), types.float32, 1)
            for n, total in enumerate(totals):
                block = builder.mul(loop.index, I64(4 * BLOCK))
                address = builder.add(builder.add(to, block), I64(4 * LANES * n))
                product = builder.fmul(
                    builder.sitofp(total, floats), splat(builder, step, LANES), flags=CONTRACT
                )
                before = load_vector(builder, address, types.float32, LANES)
                store_vector(builder, builder.fadd(before, product, flags=CONTRACT), address)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


@intrinsic
def in_order(typingctx: Any, address: Any) -> Any:
    """Bring BLOCK float32 that `add_codes` summed up into the order of their columns."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = load_vector(builder, args[0], types.float32, BLOCK)
        order = indices(i // 8 + BLOCK // 8 * (i % 8) for i in range(BLOCK))
        store_vector(builder, builder.shuffle_vector(found, found, order), args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def dot_vectors(typingctx: Any, dtype: Any, row: Any, x: Any, vectors: Any) -> Any:
    """The sum of row[i] * x[i], float32 x, both by address, over `vectors` times WIDTH values."""
    row_step, x_step = WIDTH * dtype.instance_type.bitwidth // 8, WIDTH * 4

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, row, x, vectors = args
        total = cgutils.alloca_once_value(builder, constant(many(F32, WIDTH), 0.0))
        with cgutils.for_range(builder, vectors) as loop:
            at = builder.add(row, builder.mul(loop.index, I64(row_step)))
            weights = load_vector(builder, at, dtype.instance_type, WIDTH)
            at = builder.add(x, builder.mul(loop.index, I64(x_step)))
            product = builder.fmul(
                weights, load_vector(builder, at, types.float32, WIDTH), flags=CONTRACT
            )
            builder.store(builder.fadd(builder.load(total), product, flags=CONTRACT), total)
        reduce = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
        lanes = [F32(0.0), builder.load(total)]
        return call(builder, reduce, F32, lanes, fastmath=("reassoc",))

    return types.float32(dtype, types.int64, types.int64, types.int64), codegen


@intrinsic
def weigh_rows(
    typingctx: Any, dtype: Any, to: Any, row: Any, stride: Any, factors: Any, count: Any
) -> Any:
    """WIDTH float32 at `to` = the sum of factors[i] times those at row + i * stride bytes.

    `factors` is the address of `count` float32. The sum stays in registers.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, to, row, stride, factors, count = args
        total = cgutils.alloca_once_value(builder, constant(many(F32, WIDTH), 0.0))
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(row, builder.mul(loop.index, stride))
            weights = load_vector(builder, at, dtype.instance_type, WIDTH)
            at = builder.add(factors, builder.mul(loop.index, I64(4)))
            factor = splat(builder, load_vector(builder, at, types.float32, 1))
            product = builder.fmul(weights, factor, flags=CONTRACT)
            builder.store(builder.fadd(builder.load(total), product, flags=CONTRACT), total)
        store_vector(builder, builder.load(total), to)
        return context.get_dummy_value()

    return types.void(dtype, *[types.int64] * 5), codegen
