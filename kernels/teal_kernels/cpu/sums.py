"""Sums over several rows of weights, as intrinsics: the loops that read nearly all bytes."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal_kernels.cpu.vectors import (
    CONTRACT,
    DOTS,
    F32,
    I64,
    SUMS,
    WIDTH,
    by_width,
    call,
    constant,
    fetch,
    floats_at,
    load_vector,
    many,
    splat,
    starts_of,
    store_vector,
    suffix,
)


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
