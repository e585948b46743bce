"""Inputs of INT8 and INT4, and INT4's scales, as fixed-point numbers of 16 bits, for AMX.

`codes` multiplies them, as signed bytes times 256 plus unsigned ones.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal_kernels.cpu.amx import SIDE
from teal_kernels.cpu.codes import CENTRE, STEP, TILE
from teal_kernels.cpu.vectors import (
    CONTRACT,
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    by_width,
    call,
    constant,
    fetch,
    indices,
    load_as,
    load_vector,
    many,
    splat,
    store_vector,
    suffix,
    turned,
)

_ROUND = 1.5 * 2**23  # added to a number, it leaves the nearest integer in the lowest bits


@intrinsic
def largest_of(typingctx: Any, x: Any, count: Any) -> Any:
    """The largest size among `count` float32 at an address; NaN if it is among them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, count = args
        found = [cgutils.alloca_once_value(builder, constant(many(I32, w), 0)) for w in (64, 1)]

        def take(index: Any, width: int) -> None:
            at = builder.add(x, builder.mul(index, I64(4)))
            bits = builder.and_(
                load_as(builder, at, I32, width), constant(many(I32, width), 2**31 - 1)
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


def _by_panel(builder: Any, groups: Any, body: Any) -> None:
    """IR: call body(index, mask) for each SIDE groups, with the lanes that there are."""
    panels = builder.sdiv(builder.add(groups, I64(SIDE - 1)), I64(SIDE))
    lanes = ir.Constant(many(I64, SIDE), [I64(i) for i in range(SIDE)])
    with cgutils.for_range(builder, panels) as loop:
        left = builder.sub(groups, builder.mul(loop.index, I64(SIDE)))
        body(loop.index, builder.icmp_signed("<", lanes, splat(builder, left, SIDE)))


def _halves(builder: Any, address: Any, mask: Any) -> Any:
    """IR: SIDE float16 at an address as float32, 0 where there are none."""
    words, halves = many(I16, SIDE), many(F16, SIDE)
    pointer = builder.inttoptr(address, words.as_pointer())
    arguments = [pointer, I32(1), mask, constant(words, 0)]
    found = call(builder, f"llvm.masked.load.v{SIDE}i16.p0", words, arguments)
    return builder.fpext(builder.bitcast(found, halves), many(F32, SIDE))


@intrinsic
def largest_scales(
    typingctx: Any, scales: Any, stride: Any, rows: Any, groups: Any, to: Any
) -> Any:
    """Store the largest size of each group's float16 in `rows` rows, in whole panels of SIDE.

    scales, stride: address of the first row's, and bytes to the next row's.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scales, stride, rows, groups, to = args
        floats = many(F32, SIDE)
        top = cgutils.alloca_once(builder, floats)

        def take(panel: Any, mask: Any) -> None:
            start = builder.add(scales, builder.mul(panel, I64(2 * SIDE)))
            builder.store(constant(floats, 0.0), top)
            with cgutils.for_range(builder, rows) as loop:
                at = builder.add(start, builder.mul(loop.index, stride))
                found = _halves(builder, at, mask)
                found = call(builder, f"llvm.fabs.{suffix(SIDE)}", floats, [found])
                before = builder.load(top)
                more = builder.fcmp_ordered(">", found, before)
                builder.store(builder.select(more, found, before), top)
            place = builder.add(to, builder.mul(panel, I64(4 * SIDE)))
            store_vector(builder, builder.load(top), place)

        _by_panel(builder, groups, take)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def unpack_scales(
    typingctx: Any, scales: Any, offsets: Any, stride: Any, rows: Any, groups: Any, ahead: Any,
    each: Any, most: Any, factors: Any, centres: Any,
) -> Any:  # fmt: skip
    """Turn the scales of `rows` rows to fixed-point numbers, and to what CENTRE stands for.

    scales, offsets, stride: addresses of the first row's float16, and bytes to the next row's.
    ahead: bytes to rows whose are fetched meanwhile.
    each: address of float32, what a group's scales are multiplied with.
    most: rows that there is room for, whole steps.
    factors: address of int16 [whole panels of groups, most].
    centres: address of float32 [panels, most, SIDE].
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scales, offsets, stride, rows, groups, ahead, each, most, factors, centres = args
        floats, last = many(F32, SIDE), builder.sub(rows, I64(1))

        def take(panel: Any, mask: Any) -> None:
            at = builder.mul(panel, I64(2 * SIDE))
            place = builder.add(each, builder.mul(panel, I64(4 * SIDE)))
            weigh = load_vector(builder, place, types.float32, SIDE)
            column = builder.mul(builder.mul(panel, most), I64(SIDE))
            blocks = builder.sdiv(builder.add(last, I64(SIDE)), I64(SIDE))
            with cgutils.for_range(builder, blocks) as loop:
                first, found = builder.mul(loop.index, I64(SIDE)), []
                for i in range(SIDE):
                    row = builder.add(first, I64(i))
                    beyond = builder.icmp_signed(">", row, last)
                    start = builder.mul(builder.select(beyond, last, row), stride)
                    start = builder.add(start, at)
                    places = [builder.add(base, start) for base in (scales, offsets)]
                    for place in places:
                        fetch(builder, builder.add(place, ahead))
                    scale, offset = (_halves(builder, place, mask) for place in places)
                    whole = builder.fmul(scale, weigh, flags=CONTRACT)
                    whole = builder.fadd(whole, constant(floats, 0.5), flags=CONTRACT)
                    whole = builder.fptosi(whole, many(I32, SIDE))
                    found.append(builder.trunc(whole, many(I16, SIDE)))
                    centre = builder.fmul(scale, constant(floats, float(CENTRE)), flags=CONTRACT)
                    centre = builder.fadd(centre, offset, flags=CONTRACT)
                    to = builder.mul(builder.add(column, builder.mul(row, I64(SIDE))), I64(4))
                    store_vector(builder, centre, builder.add(centres, to))
                for i, factor in enumerate(turned(builder, found)):
                    to = builder.add(column, builder.add(first, builder.mul(most, I64(i))))
                    store_vector(builder, factor, builder.add(factors, builder.mul(to, I64(2))))

        _by_panel(builder, groups, take)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), codegen


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
            weighs = [load_as(builder, builder.add(at, I64(64 * i)), I16, 32) for i in range(2)]
            start = builder.mul(step.index, I64(2 * TILE))
            with cgutils.for_range(builder, rows) as row:
                at = builder.add(words, start)
                at = builder.add(at, builder.mul(row.index, I64(2 * STEP)))
                products = []
                for i, weigh in enumerate(weighs):
                    values = load_as(builder, builder.add(at, I64(64 * i)), I16, 32)
                    name = "llvm.x86.avx512.pmul.hr.sw.512"
                    product = call(builder, name, half, [values, weigh])
                    products.append(builder.bitcast(product, many(I8, 64)))
                target = builder.add(builder.add(to, start), builder.mul(row.index, I64(STEP)))
                for part, place in ((1, target), (0, builder.add(target, I64(TILE)))):
                    turns = indices(range(part, 2 * STEP, 2))
                    store_vector(builder, builder.shuffle_vector(*products, turns), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen
