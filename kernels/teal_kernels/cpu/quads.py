"""Sums of integer weights, four products with one instruction (x86's `vpdpbusd`), as intrinsics.

It multiplies unsigned bytes with signed ones. Activations become multiples of a step, in two signed
bytes, 256 * high + low, so that they keep 16 bits of the largest that shares their step. llama.cpp
keeps 8 of the largest of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal_kernels.cpu.vectors import (
    CONTRACT,
    DOTS,
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
    features_of,
    fetch,
    indices,
    load_as,
    load_vector,
    many,
    splat,
    starts_of,
    store_vector,
    suffix,
)

# The most steps of a value, so that no high byte is beyond 127.
MOST = 127 * 256
# Added to a float that is no larger, it leaves the nearest integer plus 128 in the low half of the
# sum's bits: the high byte, and the low one plus 128.
TO_INTEGER = 1.5 * 2**23 + 128
# Inputs of `dot_quads` that share a step: a cache line of codes. They become four lines: high
# parts, low parts, int32 sums, and the step in every lane.
LINE, LINE_BYTES = 64, 256


def lanes_of(context: Any) -> tuple[int, ...]:
    """Lanes of 32 bits of the registers that have the instruction, the widest first; or none."""
    found = features_of(context)
    if {"+avx512vnni", "+avx512bw", "+avx512vl"} <= found:
        return (16, 8)
    return (8,) if "+avxvnni" in found else ()


def add_fours(builder: Any, total: Any, codes: Any, factors: Any) -> Any:
    """IR: total + the sums of four unsigned bytes times four signed ones, lanes of 32 bits."""
    name = f"llvm.x86.avx512.vpdpbusd.{32 * total.type.count}"
    return call(builder, name, total.type, [total, codes, factors])


def add_products(
    builder: Any, start: Any, codes: Sequence[Any], high: Sequence[Any], low: Sequence[Any]
) -> Any:
    """IR: start + the sums of codes times the factors whose parts are high and low."""
    total = constant(start.type, 0)
    for code, part in zip(codes, high, strict=True):
        total = add_fours(builder, total, code, part)
    total = builder.add(builder.shl(total, constant(total.type, 8)), start)
    for code, part in zip(codes, low, strict=True):
        total = add_fours(builder, total, code, part)
    return total


def transposed(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """IR: four vectors of bytes → four of 32 bits, whose lanes hold a byte of each.

    Byte 16 * p + 4 * n + i is in lane 4 * p + i of the nth.
    """

    def by_turns(a: Any, b: Any, size: int) -> list[Any]:
        """Elements of `size` bytes of each 128 bits, the lower half, the upper: `vpunpck`."""
        count, each = rows[0].type.count // size, 16 // size
        kind = ir.VectorType(ir.IntType(8 * size), count)
        a, b = builder.bitcast(a, kind), builder.bitcast(b, kind)
        return [
            builder.shuffle_vector(a, b, indices(
                part + half + i // 2 + i % 2 * count
                for part in range(0, count, each) for i in range(each)
            ))
            for half in (0, each // 2)
        ]  # fmt: skip

    a, b, c, d = rows
    lanes = ir.VectorType(I32, a.type.count // 4)
    return [
        builder.bitcast(four, lanes)
        for pairs in zip(by_turns(a, b, 1), by_turns(c, d, 1), strict=True)
        for four in by_turns(*pairs, 2)
    ]


def column_order(width: int, per_byte: int) -> list[int]:
    """Where each column of `width` is among the sums over transposed rows."""
    lanes, order = width // per_byte // 4, []
    for column in range(width):
        byte, half = divmod(column, per_byte)
        n = per_byte * (byte % 16 // 4) + half
        order.append(n * lanes + byte // 16 * 4 + byte % 4)
    return order


def split(builder: Any, values: Any) -> tuple[Any, Any, Any]:
    """IR: float32 [n] → their high and low bytes, and the step.

    The step is no number where one of the values is none or is infinite.
    """
    floats, n = values.type, values.type.count
    size = call(builder, f"llvm.fabs.{suffix(n)}", floats, [values])
    least, name = F32(1e-30), f"llvm.vector.reduce.fmax.{suffix(n)}"
    top = call(builder, name, F32, [size], fastmath=("nnan",))
    top = builder.select(builder.fcmp_ordered(">", top, least), top, least)
    each = splat(builder, builder.fdiv(F32(MOST), top), n)
    shifted = builder.fadd(
        builder.fmul(values, each, flags=CONTRACT), constant(floats, TO_INTEGER), flags=CONTRACT
    )
    words, bytes_ = many(I16, n), many(I8, n)
    steps = builder.trunc(builder.bitcast(shifted, many(I32, n)), words)
    high = builder.trunc(builder.ashr(steps, constant(words, 8)), bytes_)
    low = builder.xor(builder.trunc(steps, bytes_), constant(bytes_, 128))
    nothing = builder.fmul(size, constant(floats, 0.0))
    name = f"llvm.vector.reduce.fadd.{suffix(n)}"
    nothing = call(builder, name, F32, [F32(0.0), nothing], fastmath=("reassoc",))
    step = builder.fadd(builder.fmul(top, F32(1 / MOST)), nothing)
    return high, low, step


def unsigned(builder: Any, codes: Any) -> Any:
    """IR: signed bytes plus 128."""
    return builder.xor(codes, constant(codes.type, 128 if codes.type.element is I8 else 0x80808080))


@intrinsic
def in_quads(typingctx: Any, columns: Any) -> Any:
    """How many of the columns of INT8 `add_bytes` can take."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        widths = [4 * lanes for lanes in lanes_of(context)]
        return builder.and_(args[0], I64(-widths[-1])) if widths else I64(0)

    return types.int64(types.int64), codegen


@intrinsic
def add_bytes(
    typingctx: Any, rows: Any, ahead: Any, at: Any, factors: Any, count: Any, to: Any
) -> Any:
    """`add_rows` of INT8 for `in_quads` columns, with factors in 16 bits of the largest.

    The sums are in the order of `in_order`.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, ahead, at, factors, count, to = args
        if not lanes_of(context):
            return context.get_dummy_value()
        starts, later = starts_of(builder, rows, at), starts_of(builder, ahead, at)
        high, low, step = split(builder, load_as(builder, factors, F32, ROWS))
        parts = many(I32, ROWS // 4)
        quads = builder.bitcast(high, parts), builder.bitcast(low, parts)
        # Weights are multiplied as bytes from 1 to 255: what 128 adds to each is taken off.
        wide = many(I32, ROWS)
        name = f"llvm.vector.reduce.add.v{ROWS}i32"
        sums = [call(builder, name, I32, [builder.sext(part, wide)]) for part in (high, low)]
        total = builder.add(builder.mul(sums[0], I32(256)), sums[1])
        start = builder.mul(total, I32(-128))

        def add(index: Any, width: int) -> None:
            lanes = width // 4
            fours = []
            for i in range(0, ROWS, 4):
                codes = [
                    unsigned(builder, load_as(builder, builder.add(row, index), I8, width))
                    for row in starts[i : i + 4]
                ]
                fours.append(transposed(builder, codes))
            for row in later:
                fetch(builder, builder.add(row, index))
            highs, lows = (
                [
                    splat(builder, builder.extract_element(part, I32(i)), lanes)
                    for i in range(ROWS // 4)
                ]
                for part in quads
            )
            target = builder.add(to, builder.mul(index, I64(4)))
            for n, two in enumerate(zip(*fours, strict=True)):
                total = add_products(builder, splat(builder, start, lanes), two, highs, lows)
                address = builder.add(target, I64(4 * lanes * n))
                product = builder.fmul(
                    builder.sitofp(total, many(F32, lanes)), splat(builder, step, lanes),
                    flags=CONTRACT,
                )  # fmt: skip
                before = load_vector(builder, address, types.float32, lanes)
                store_vector(builder, builder.fadd(before, product, flags=CONTRACT), address)

        by_width(builder, count, [4 * lanes for lanes in lanes_of(context)], add)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def split_lines(typingctx: Any, dtype: Any, x: Any, lines: Any, to: Any) -> Any:
    """Write what `dot_quads` takes of `lines` times LINE float32 at x: LINE_BYTES each, at `to`.

    Returns False where that is of no use: for other weights than INT8, on another CPU.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, x, lines, to = args
        if dtype.instance_type != types.int8 or not lanes_of(context):
            return ir.Constant(I1, 0)
        ints = many(I32, LINE // 4)
        with cgutils.for_range(builder, lines) as loop:
            at = builder.add(x, builder.mul(loop.index, I64(4 * LINE)))
            high, low, step = split(builder, load_as(builder, at, F32, LINE))
            high, low = builder.bitcast(high, ints), builder.bitcast(low, ints)
            total, ones = constant(ints, 0), constant(ints, 0x01010101)
            total = add_products(builder, total, [ones], [high], [low])
            total = builder.mul(total, constant(ints, -128))
            place = builder.add(to, builder.mul(loop.index, I64(LINE_BYTES)))
            steps = splat(builder, step, LINE // 4)
            for n, part in enumerate((high, low, total, steps)):
                store_vector(builder, part, builder.add(place, I64(LINE * n)))
        return ir.Constant(I1, 1)

    return types.boolean(dtype, *[types.int64] * 3), codegen


@intrinsic
def dot_quads(
    typingctx: Any, base: Any, stride: Any, ahead: Any, lines: Any, count: Any, to: Any
) -> Any:
    """`dot_rows` of INT8 with what `split_lines` made at `lines`, `count` of them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, stride, ahead, lines, count, to = args
        if not lanes_of(context):
            return context.get_dummy_value()
        lanes = lanes_of(context)[0]
        sums = many(F32, lanes)
        starts = [builder.add(base, builder.mul(stride, I64(i))) for i in range(DOTS)]
        totals = [cgutils.alloca_once_value(builder, constant(sums, 0.0)) for _ in starts]
        with cgutils.for_range(builder, count) as loop:
            offset = builder.mul(loop.index, I64(LINE))
            line = builder.add(lines, builder.mul(loop.index, I64(LINE_BYTES)))
            for start in starts:
                fetch(builder, builder.add(builder.add(start, offset), ahead))
            for at in range(0, LINE, 4 * lanes):
                high, low, begin, step = (
                    load_as(builder, builder.add(line, I64(LINE * n + at)), kind, lanes)
                    for n, kind in enumerate((I32, I32, I32, F32))
                )
                for start, total in zip(starts, totals, strict=True):
                    address = builder.add(builder.add(start, offset), I64(at))
                    codes = unsigned(builder, load_as(builder, address, I32, lanes))
                    found = add_products(builder, begin, [codes], [high], [low])
                    product = builder.fmul(builder.sitofp(found, sums), step, flags=CONTRACT)
                    added = builder.fadd(builder.load(total), product, flags=CONTRACT)
                    builder.store(added, total)
        for i, total in enumerate(totals):
            name = f"llvm.vector.reduce.fadd.{suffix(lanes)}"
            whole = call(builder, name, F32, [F32(0.0), builder.load(total)], fastmath=("reassoc",))
            store_vector(builder, whole, builder.add(to, I64(4 * i)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen
