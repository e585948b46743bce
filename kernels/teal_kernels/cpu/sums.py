"""Sums over several rows of weights, as intrinsics: the loops that read nearly all bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal_kernels.cpu.vectors import (
    BLOCK,
    CONTRACT,
    DOTS,
    F32,
    I1,
    I16,
    I32,
    I64,
    ROWS,
    SUMS,
    WIDTH,
    by_width,
    call,
    constant,
    fetch,
    indices,
    load_vector,
    many,
    registers,
    splat,
    store_vector,
    suffix,
)


def starts_of(builder: Any, rows: Any, at: Any) -> list[Any]:
    """IR: the ROWS addresses at `rows`, each plus `at`."""
    pointers = (
        builder.inttoptr(builder.add(rows, I64(8 * i)), I64.as_pointer()) for i in range(ROWS)
    )
    return [builder.add(builder.load(pointer), at) for pointer in pointers]


def floats_at(builder: Any, address: Any) -> list[Any]:
    """IR: the ROWS float32 at an address."""
    return [
        load_vector(builder, builder.add(address, I64(4 * i)), types.float32, 1)
        for i in range(ROWS)
    ]


@intrinsic
def add_rows(
    typingctx: Any, dtype: Any, rows: Any, ahead: Any, at: Any, factors: Any, count: Any, to: Any
) -> Any:
    """`count` float32 at `to` += the sum of ROWS factors times what is in the rows; not of INT4.

    rows, ahead: addresses of ROWS addresses; those ahead are only fetched into the cache.
    at: bytes from there to the first value.
    factors: address of the float32.
    """
    kind = dtype.instance_type

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, rows, ahead, at, factors, count, to = args
        starts, weighs = starts_of(builder, rows, at), floats_at(builder, factors)
        later = starts_of(builder, ahead, at)

        def add(index: Any, width: int) -> None:
            offset = builder.mul(index, I64(kind.bitwidth // 8))
            target = builder.add(to, builder.mul(index, I64(4)))
            total = load_vector(builder, target, types.float32, width)
            for start, weigh in zip(starts, weighs, strict=True):
                weights = load_vector(builder, builder.add(start, offset), kind, width)
                product = builder.fmul(weights, splat(builder, weigh, width), flags=CONTRACT)
                total = builder.fadd(total, product, flags=CONTRACT)
            for start in later:
                fetch(builder, builder.add(start, offset))
            store_vector(builder, total, target)

        by_width(builder, count, (WIDTH, 8, 4, 2, 1), add)
        return context.get_dummy_value()

    return types.void(dtype, *[types.int64] * 6), codegen


@intrinsic
def scale_factors(
    typingctx: Any, rows: Any, ahead: Any, at: Any, factors: Any, groups: Any, pairs: Any,
    steps: Any,
) -> Any:  # fmt: skip
    """Multiply ROWS factors with the `groups` float16 scales in each row, in 16 bits.

    rows, ahead, at, factors: as for `add_rows`.
    pairs: address of int32 [ROWS / 2, groups] for the products as multiples of a step, rounded to
        16 bits, two rows in one: the first in the low half.
    steps: address of float32 [groups]: a 32767th of the largest product of a group.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, ahead, at, factors, groups, pairs, steps = args
        starts, weighs = starts_of(builder, rows, at), floats_at(builder, factors)
        later = starts_of(builder, ahead, at)

        def scale(index: Any, width: int) -> None:
            floats, ints = many(F32, width), many(I32, width)
            offset, place = (builder.mul(index, I64(size)) for size in (2, 4))
            products, top = [], constant(floats, 1e-30)
            for start, weigh in zip(starts, weighs, strict=True):
                scales = load_vector(builder, builder.add(start, offset), types.float16, width)
                products.append(builder.fmul(scales, splat(builder, weigh, width)))
                size = call(builder, f"llvm.fabs.{suffix(width)}", floats, [products[-1]])
                top = builder.select(builder.fcmp_ordered(">", size, top), size, top)
            for start in later:
                fetch(builder, builder.add(start, offset))
            step = builder.fmul(top, constant(floats, 1 / 32767))
            store_vector(builder, step, builder.add(steps, place))
            each = builder.fdiv(constant(floats, 1.0), step)
            whole = []
            for product in products:
                # Added to a number whose last bit is worth one, it is rounded to the nearest.
                shifted = builder.fadd(
                    builder.fmul(product, each, flags=CONTRACT),
                    constant(floats, 1.5 * 2**23), flags=CONTRACT,
                )  # fmt: skip
                whole.append(builder.bitcast(shifted, ints))
            for i in range(0, ROWS, 2):
                low = builder.and_(whole[i], constant(ints, 0xFFFF))
                high = builder.shl(whole[i + 1], constant(ints, 16))
                row = builder.mul(groups, I64(2 * i))
                address = builder.add(builder.add(pairs, row), place)
                store_vector(builder, builder.or_(low, high), address)

        by_width(builder, groups, (8, 4, 2, 1), scale)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def add_codes(
    typingctx: Any, rows: Any, ahead: Any, first: Any, group: Any, groups: Any, pairs: Any,
    steps: Any, columns: Any, to: Any,
) -> Any:  # fmt: skip
    """`columns` float32 at `to` += the sum of steps * pairs * the rows' INT4 codes.

    Integers are summed, which takes two rows with one instruction where there is one like x86's
    `vpmaddwd`. The sums are in the order of `in_order`.

    rows, ahead: as for `add_rows`.
    first, group, columns: the column to start with, the columns of a group, and how many there are;
        multiples of BLOCK.
    groups, pairs, steps: as for `scale_factors`.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, ahead, first, group, groups, pairs, steps, columns, to = args
        starts = starts_of(builder, rows, builder.lshr(first, I64(1)))
        later = starts_of(builder, ahead, builder.lshr(first, I64(1)))

        def add(index: Any, width: int) -> None:
            lanes = width // 8
            dwords, words = many(I32, lanes), many(I16, 2 * lanes)
            offset, column = builder.lshr(index, I64(1)), builder.add(first, index)
            places = [
                builder.mul(builder.udiv(builder.add(column, I64(more)), group), I64(4))
                for more in range(0, width, BLOCK)
            ]

            def of_groups(base: Any, dtype: Any) -> Any:
                """The value of each group, in the lanes of its columns."""
                parts = [
                    splat(builder, load_vector(builder, builder.add(base, at), dtype, 1), lanes)
                    for at in places
                ]
                low = ir.Constant(ir.VectorType(I1, lanes), [I1(i < 8) for i in range(lanes)])
                return builder.select(low, parts[0], parts[1]) if parts[1:] else parts[0]

            totals = [constant(dwords, 0)] * 8
            for i in range(0, ROWS, 2):
                row = builder.add(pairs, builder.mul(groups, I64(2 * i)))
                factor = builder.bitcast(of_groups(row, types.uint32), words)
                a, b = (
                    load_vector(builder, builder.add(start, offset), types.uint32, lanes)
                    for start in starts[i : i + 2]
                )
                for n, codes in enumerate(interleaved(builder, a, b, lanes)):
                    totals[n] = builder.add(totals[n], multiply_add(builder, codes, factor, lanes))
            for start in later:
                fetch(builder, builder.add(start, offset))
            step = of_groups(steps, types.float32)
            target = builder.add(to, builder.mul(index, I64(4)))
            for n, total in enumerate(totals):
                address = builder.add(target, I64(4 * lanes * n))
                product = builder.fmul(
                    builder.sitofp(total, many(F32, lanes)), step, flags=CONTRACT
                )
                before = load_vector(builder, address, types.float32, lanes)
                store_vector(builder, builder.fadd(before, product, flags=CONTRACT), address)

        by_width(builder, columns, [8 * lanes for lanes in registers(context)], add)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


def interleaved(builder: Any, a: Any, b: Any, lanes: int) -> Iterator[Any]:
    """IR: eight vectors of words, codes of `a` and of `b` by turns; the nth of each lane's."""
    words = many(I16, 2 * lanes)
    sixteen = constant(a.type, 16)
    turns = indices(i + 2 * lanes * (i % 2) for i in range(2 * lanes))
    for low, high in ((a, builder.shl(b, sixteen)), (builder.lshr(a, sixteen), b)):
        both = builder.shuffle_vector(
            builder.bitcast(low, words), builder.bitcast(high, words), turns
        )
        for n in range(4):
            codes = builder.lshr(both, constant(words, 4 * n))
            yield builder.and_(codes, constant(words, 15))


def multiply_add(builder: Any, a: Any, b: Any, lanes: int) -> Any:
    """IR: the sum of the products of two neighbouring words each, int32; x86's `vpmaddwd`."""
    wide = many(I32, 2 * lanes)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (
        builder.shuffle_vector(product, product, indices(range(start, 2 * lanes, 2)))
        for start in (0, 1)
    )
    return builder.add(even, odd)


@intrinsic
def in_order(typingctx: Any, address: Any, columns: Any) -> Any:
    """Bring float32 that `add_codes` summed up into the order of their columns."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, columns = args

        def order(index: Any, width: int) -> None:
            at = builder.add(address, builder.mul(index, I64(4)))
            found = load_vector(builder, at, types.float32, width)
            turns = indices(i // 8 + width // 8 * (i % 8) for i in range(width))
            store_vector(builder, builder.shuffle_vector(found, found, turns), at)

        by_width(builder, columns, [8 * lanes for lanes in registers(context)], order)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def dot_rows(
    typingctx: Any, dtype: Any, base: Any, stride: Any, ahead: Any, x: Any, lines: Any, to: Any
) -> Any:
    """DOTS float32 at `to` = the products of DOTS rows with float32 x, over `lines` cache lines.

    base, stride: address of the first row, and bytes from one row to the next.
    ahead: bytes from a weight to the one that is fetched into the cache beside it.
    x: address of the float32.
    """
    kind = dtype.instance_type
    columns = 64 * 8 // kind.bitwidth  # of a line

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, base, stride, ahead, x, lines, to = args
        sums = many(F32, SUMS)
        starts = [builder.add(base, builder.mul(stride, I64(i))) for i in range(DOTS)]
        totals = [cgutils.alloca_once_value(builder, constant(sums, 0.0)) for _ in starts]
        with cgutils.for_range(builder, lines) as loop:
            offset = builder.mul(loop.index, I64(64))
            for start in starts:
                fetch(builder, builder.add(builder.add(start, offset), ahead))
            for column in range(0, columns, SUMS):
                at = builder.mul(
                    builder.add(builder.mul(loop.index, I64(columns)), I64(column)), I64(4)
                )
                values = load_vector(builder, builder.add(x, at), types.float32, SUMS)
                at = builder.add(offset, I64(column * kind.bitwidth // 8))
                for start, total in zip(starts, totals, strict=True):
                    weights = load_vector(builder, builder.add(start, at), kind, SUMS)
                    product = builder.fmul(weights, values, flags=CONTRACT)
                    added = builder.fadd(builder.load(total), product, flags=CONTRACT)
                    builder.store(added, total)
        for i, total in enumerate(totals):
            lanes = [F32(0.0), builder.load(total)]
            name = f"llvm.vector.reduce.fadd.{suffix(SUMS)}"
            total = call(builder, name, F32, lanes, fastmath=("reassoc",))
            store_vector(builder, total, builder.add(to, I64(4 * i)))
        return context.get_dummy_value()

    return types.void(dtype, *[types.int64] * 6), codegen


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
