"""Sums over several rows of INT4, as intrinsics.

A factor times a group's scale becomes an integer, so that codes are multiplied as integers: of four
rows with one instruction where the CPU has it (`quads.py`), elsewhere of two (x86's `vpmaddwd`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from teal_kernels.cpu.quads import (
    MOST,
    TO_INTEGER,
    add_products,
    column_order,
    lanes_of,
    transposed,
)
from teal_kernels.cpu.vectors import (
    BLOCK,
    CONTRACT,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    ROWS,
    by_width,
    call,
    constant,
    fetch,
    floats_at,
    indices,
    load_vector,
    many,
    registers,
    splat,
    starts_of,
    store_vector,
    suffix,
)

# Rows in the order in which `_quads` packs their bytes.
_ORDER = (0, 2, 1, 3)


@intrinsic
def scale_factors(
    typingctx: Any, rows: Any, ahead: Any, at: Any, factors: Any, groups: Any, products: Any,
    steps: Any,
) -> Any:  # fmt: skip
    """Multiply ROWS factors with the `groups` float16 scales in each row, in 16 bits.

    rows, ahead, at, factors: as for `add_rows`.
    products: address of int32 [ROWS / 2, groups] for the products as multiples of a step: high
        bytes of each four rows, low bytes of them; or 16 bits of each two, the first in the low
        half.
    steps: address of float32 [groups]: what divides the largest product of a group into MOST, or
        32767, steps.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, ahead, at, factors, groups, products, steps = args
        starts, weighs = starts_of(builder, rows, at), floats_at(builder, factors)
        later = starts_of(builder, ahead, at)
        by_four = bool(lanes_of(context))
        most, to_integer = (MOST, TO_INTEGER) if by_four else (32767, 1.5 * 2**23)

        def scale(index: Any, width: int) -> None:
            floats, ints = many(F32, width), many(I32, width)
            offset, place = (builder.mul(index, I64(size)) for size in (2, 4))
            scaled, top = [], constant(floats, 1e-30)
            for start, weigh in zip(starts, weighs, strict=True):
                scales = load_vector(builder, builder.add(start, offset), types.float16, width)
                scaled.append(builder.fmul(scales, splat(builder, weigh, width)))
                size = call(builder, f"llvm.fabs.{suffix(width)}", floats, [scaled[-1]])
                top = builder.select(builder.fcmp_ordered(">", size, top), size, top)
            for start in later:
                fetch(builder, builder.add(start, offset))
            step = builder.fmul(top, constant(floats, 1 / most))
            store_vector(builder, step, builder.add(steps, place))
            each = builder.fdiv(constant(floats, 1.0), step)
            whole = []
            for product in scaled:
                # Added to a number whose last bit is worth one, it is rounded to the nearest.
                shifted = builder.fadd(
                    builder.fmul(product, each, flags=CONTRACT), constant(floats, to_integer),
                    flags=CONTRACT,
                )  # fmt: skip
                whole.append(builder.bitcast(shifted, ints))
            found = _pairs(builder, whole)
            for i, part in enumerate(_quads(builder, found) if by_four else found):
                row = builder.mul(groups, I64(4 * i))
                store_vector(builder, part, builder.add(builder.add(products, row), place))

        by_width(builder, groups, (16, 8, 4, 2, 1), scale)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


def _pairs(builder: Any, values: Sequence[Any]) -> list[Any]:
    """IR: the low halves of two neighbours each, in 32 bits."""
    kind = values[0].type
    return [
        builder.or_(
            builder.and_(low, constant(kind, 0xFFFF)), builder.shl(high, constant(kind, 16))
        )
        for low, high in zip(values[::2], values[1::2], strict=True)
    ]


def _quads(builder: Any, pairs: Sequence[Any]) -> list[Any]:
    """IR: the bits of sums with TO_INTEGER as pairs → high bytes of fours of rows, low bytes."""
    kind, count = pairs[0].type, getattr(pairs[0].type, "count", 1)
    words, parts = many(I16, 2 * count), []
    for shift in (8, 0):
        for two in zip(pairs[::2], pairs[1::2], strict=True):
            even, odd = (
                builder.ashr(builder.bitcast(pair, words), constant(words, shift)) for pair in two
            )
            even = builder.and_(even, constant(words, 255))
            both = builder.or_(even, builder.shl(odd, constant(words, 8)))
            signs = constant(words, 0 if shift else 0x8080)
            parts.append(builder.bitcast(builder.xor(both, signs), kind))
    return parts


@intrinsic
def add_codes(
    typingctx: Any, rows: Any, ahead: Any, first: Any, group: Any, groups: Any, products: Any,
    steps: Any, columns: Any, to: Any,
) -> Any:  # fmt: skip
    """`columns` float32 at `to` += the sum of steps * products * the rows' codes.

    The sums are in the order of `in_order`.

    rows, ahead: as for `add_rows`.
    first, group, columns: the column to start with, the columns of a group, and how many there are;
        multiples of BLOCK.
    groups, products, steps: as for `scale_factors`.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, ahead, first, group, groups, products, steps, columns, to = args
        starts = starts_of(builder, rows, builder.lshr(first, I64(1)))
        later = starts_of(builder, ahead, builder.lshr(first, I64(1)))
        sums = _sums_by_four if lanes_of(context) else _sums_by_two

        def add(index: Any, width: int) -> None:
            lanes = width // 8
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

            factors = [
                of_groups(builder.add(products, builder.mul(groups, I64(4 * i))), types.uint32)
                for i in range(ROWS // 2)
            ]
            addresses = [builder.add(start, offset) for start in starts]
            totals = sums(builder, addresses, factors, lanes)
            for start in later:
                fetch(builder, builder.add(start, offset))
            step = of_groups(steps, types.float32)
            target = builder.add(to, builder.mul(index, I64(4)))
            for n, (total, share) in enumerate(totals):
                address = builder.add(target, I64(4 * lanes * n))
                product = builder.fmul(
                    builder.sitofp(total, many(F32, lanes)),
                    builder.fmul(step, constant(step.type, share)), flags=CONTRACT,
                )  # fmt: skip
                before = load_vector(builder, address, types.float32, lanes)
                store_vector(builder, builder.fadd(before, product, flags=CONTRACT), address)

        by_width(builder, columns, _widths(context), add)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


def _widths(context: Any) -> list[int]:
    """Columns that a step of `add_codes` takes, the most first."""
    return [8 * lanes for lanes in lanes_of(context) or registers(context)]


def _sums_by_four(
    builder: Any, addresses: Sequence[Any], factors: Sequence[Any], lanes: int
) -> Iterator[tuple[Any, float]]:
    """IR: eight vectors of sums, and what share of a step one of each counts."""
    kind = many(I32, lanes)
    fours = []
    for i in range(0, ROWS, 4):
        rows = [
            builder.bitcast(
                load_vector(builder, addresses[i + k], types.uint32, lanes), many(I8, 4 * lanes)
            )
            for k in _ORDER
        ]
        fours.append(transposed(builder, rows))
    high, low = factors[: ROWS // 4], factors[ROWS // 4 :]
    for pairs in zip(*fours, strict=True):
        # The upper codes stay where they are and count 16 times.
        for mask, share in ((0x0F0F0F0F, 1.0), (0xF0F0F0F0, 1 / 16)):
            codes = [builder.and_(pair, constant(kind, mask)) for pair in pairs]
            yield add_products(builder, constant(kind, 0), codes, high, low), share


def _sums_by_two(
    builder: Any, addresses: Sequence[Any], factors: Sequence[Any], lanes: int
) -> Iterator[tuple[Any, float]]:
    """IR: the same, of pairs of rows."""
    totals = [constant(many(I32, lanes), 0)] * 8
    for i, factor in enumerate(factors):
        a, b = (
            load_vector(builder, address, types.uint32, lanes)
            for address in addresses[2 * i : 2 * i + 2]
        )
        words = builder.bitcast(factor, many(I16, 2 * lanes))
        for n, codes in enumerate(_interleaved(builder, a, b, lanes)):
            totals[n] = builder.add(totals[n], _multiply_add(builder, codes, words, lanes))
    return iter([(total, 1.0) for total in totals])


def _interleaved(builder: Any, a: Any, b: Any, lanes: int) -> Iterator[Any]:
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


def _multiply_add(builder: Any, a: Any, b: Any, lanes: int) -> Any:
    """IR: the sum of the products of two neighbouring words each, int32; x86's `vpmaddwd`."""
    wide = many(I32, 2 * lanes)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (
        builder.shuffle_vector(product, product, indices(range(start, 2 * lanes, 2)))
        for start in (0, 1)
    )
    return builder.add(even, odd)


@intrinsic
def in_order(typingctx: Any, dtype: Any, address: Any, columns: Any) -> Any:
    """Bring float32 that `add_codes` or `add_bytes` summed up into the order of their columns."""
    per_byte = 2 if dtype.instance_type is types.uint8 else 1

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, address, columns = args
        by_four = lanes_of(context)

        def order(index: Any, width: int) -> None:
            at = builder.add(address, builder.mul(index, I64(4)))
            found = load_vector(builder, at, types.float32, width)
            if by_four:
                turns = column_order(width, per_byte)
            else:
                turns = [i // 8 + width // 8 * (i % 8) for i in range(width)]
            store_vector(builder, builder.shuffle_vector(found, found, indices(turns)), at)

        widths = [4 * per_byte * lanes for lanes in by_four or registers(context)]
        by_width(builder, columns, widths, order)
        return context.get_dummy_value()

    return types.void(dtype, types.int64, types.int64), codegen
