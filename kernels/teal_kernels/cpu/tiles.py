"""Intrinsics of a product for several tokens: rows of weights unpacked to floats, and tiles."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from teal_kernels.cpu.vectors import (
    BLOCK,
    CONTRACT,
    F32,
    I8,
    I32,
    I64,
    bits_of,
    by_width,
    call,
    constant,
    features_of,
    fetch,
    indices,
    load_vector,
    many,
    offset_of,
    splat,
    store_vector,
    suffix,
    turned,
)

FEATURES = features_of(cpu_target.target_context)
# Tokens and columns of a tile: its sums, a row's columns and a token's value fill the registers.
TOKENS, COLUMNS = (12, 32) if "+avx512f" in FEATURES else (6, 16)


def _codes(builder: Any, address: Any, width: int) -> Any:
    """IR: `width` values of INT4, from the byte at an address on, as float32."""
    bytes_ = many(I8, width // 2)
    pairs = builder.load(builder.inttoptr(address, bytes_.as_pointer()))
    pairs.align = 1
    low = builder.and_(pairs, constant(bytes_, 15))
    high = builder.lshr(pairs, constant(bytes_, 4))
    turns = indices(i // 2 + width // 2 * (i % 2) for i in range(width))
    codes = builder.shuffle_vector(low, high, turns)
    return builder.sitofp(builder.zext(codes, many(I32, width)), many(F32, width))


def weights_of(builder: Any, kind: Any, place: tuple[Any, ...], column: Any, width: int) -> Any:
    """IR: `width` columns of a row as float32, which are of one group if they are INT4.

    place: the row's address, the columns of a group, the groups, and the address of their scales.
    """
    row, group, groups, scales = place
    address = offset_of(builder, row, kind, column)
    if kind != types.uint8:
        return load_vector(builder, address, kind, width)
    g = builder.udiv(column, group)
    scale, offset = (
        load_vector(builder, builder.add(scales, builder.mul(i, I64(2))), types.float16, 1)
        for i in (g, builder.add(g, groups))
    )
    product = builder.fmul(
        _codes(builder, address, width), splat(builder, scale, width), flags=CONTRACT
    )
    return builder.fadd(product, splat(builder, offset, width), flags=CONTRACT)


@intrinsic
def unpack(
    typingctx: Any, dtype: Any, place: Any, first: Any, panels: Any, ahead: Any, to: Any, step: Any
) -> Any:
    """Store a row's columns from `first` on as float32, in panels of COLUMNS each.

    place: as `weights_of` has it, with groups of whole panels.
    ahead: bytes to a row that is fetched meanwhile.
    step: bytes from a panel to the next.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, place, first, panels, ahead, to, step = args
        kind, places = dtype.instance_type, cgutils.unpack_tuple(builder, place)
        with cgutils.for_range(builder, panels) as loop:
            column = builder.add(first, builder.mul(loop.index, I64(COLUMNS)))
            address = offset_of(builder, places[0], kind, column)
            fetch(builder, builder.add(address, ahead))
            values = weights_of(builder, kind, places, column, COLUMNS)
            store_vector(builder, values, builder.add(to, builder.mul(loop.index, step)))
        return context.get_dummy_value()

    integers = [types.int64] * 5
    return types.void(dtype, types.UniTuple(types.int64, 4), *integers), codegen


SQUARE = 16  # rows and columns that `unpack_turned` takes together


@intrinsic
def unpack_turned(
    typingctx: Any, dtype: Any, row: Any, stride: Any, squares: Any, panel: Any
) -> Any:
    """Store SQUARE rows as float32, columns as rows of a panel of COLUMNS; `squares` times SQUARE.

    row, stride: address of the first, and bytes to the next one.
    """
    kind = dtype.instance_type

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, row, stride, squares, panel = args
        with cgutils.for_range(builder, squares) as loop:
            first = builder.mul(loop.index, I64(SQUARE))
            start = offset_of(builder, row, kind, first)
            rows = [
                load_vector(builder, builder.add(start, builder.mul(stride, I64(i))), kind, SQUARE)
                for i in range(SQUARE)
            ]
            to = builder.add(panel, builder.mul(first, I64(4 * COLUMNS)))
            for i, column in enumerate(turned(builder, rows)):
                store_vector(builder, column, builder.add(to, I64(4 * COLUMNS * i)))
        return context.get_dummy_value()

    return types.void(dtype, *[types.int64] * 4), codegen


@intrinsic
def scale_row(typingctx: Any, row: Any, scales: Any, count: Any) -> Any:
    """`count` float32 at an address *= those at another."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, scales, count = args

        def scale(index: Any, width: int) -> None:
            place, at = (builder.add(base, builder.mul(index, I64(4))) for base in (row, scales))
            values, factors = (
                load_vector(builder, address, types.float32, width) for address in (place, at)
            )
            store_vector(builder, builder.fmul(values, factors), place)

        by_width(builder, count, (COLUMNS, 1), scale)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


def _adding(tokens: int, columns: int = COLUMNS) -> Any:
    """The intrinsic that adds a product for that many tokens and columns."""

    @intrinsic
    def add_tile(
        typingctx: Any, x: Any, x_step: Any, panel: Any, depth: Any, to: Any, to_step: Any
    ) -> Any:
        """to[t, :columns] += the sum of x[t, k] * panel[k] over `depth` k, for each token t.

        All are float32 and addresses. The sums stay in registers.

        x_step, to_step: bytes from a token to the next.
        panel: [depth, columns].
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_step, panel, depth, to, to_step = args
            values = [builder.add(x, builder.mul(x_step, I64(t))) for t in range(tokens)]
            targets = [builder.add(to, builder.mul(to_step, I64(t))) for t in range(tokens)]
            before = [load_vector(builder, at, types.float32, columns) for at in targets]
            sums = [cgutils.alloca_once_value(builder, vector) for vector in before]
            with cgutils.for_range(builder, depth) as loop:
                at = builder.add(panel, builder.mul(loop.index, I64(4 * columns)))
                weights = load_vector(builder, at, types.float32, columns)
                offset = builder.mul(loop.index, I64(4))
                for value, total in zip(values, sums, strict=True):
                    factor = load_vector(builder, builder.add(value, offset), types.float32, 1)
                    product = builder.fmul(weights, splat(builder, factor, columns), flags=CONTRACT)
                    builder.store(builder.fadd(builder.load(total), product, flags=CONTRACT), total)
            for target, total in zip(targets, sums, strict=True):
                store_vector(builder, builder.load(total), target)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return add_tile


add_tile, add_half_tile, add_quarter_tile = map(_adding, (TOKENS, TOKENS // 2, TOKENS // 4))
NARROW = COLUMNS // 2
add_narrow_tile = _adding(TOKENS, NARROW)


def _adding_rows(tokens: int) -> Any:
    """The intrinsic that adds rows of weights, which are turned to floats once, for few tokens."""
    width = COLUMNS if tokens <= TOKENS else COLUMNS // 2

    @intrinsic
    def add_rows(
        typingctx: Any, dtype: Any, row: Any, stride: Any, rows: Any, ahead: Any, blocks: Any,
        x: Any, x_step: Any, to: Any, to_step: Any,
    ) -> Any:  # fmt: skip
        """to[t] += the sum of x[t, k] times row k over `rows` rows, `blocks` times BLOCK columns.

        row, stride: address of the first column, and bytes to the next row; not of INT4.
        ahead: bytes to rows that are fetched meanwhile.
        x, x_step, to, to_step: addresses of float32, and bytes to the next token.
        """
        kind = dtype.instance_type

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, row, stride, rows, ahead, blocks, x, x_step, to, to_step = args
            values = [builder.add(x, builder.mul(x_step, I64(t))) for t in range(tokens)]
            targets = [builder.add(to, builder.mul(to_step, I64(t))) for t in range(tokens)]
            floats = many(F32, width)
            sums = [cgutils.alloca_once(builder, floats) for _ in targets]

            def add(column: Any, lines: int) -> None:
                start = offset_of(builder, row, kind, column)
                places = [builder.add(to, builder.mul(column, I64(4))) for to in targets]
                for place, total in zip(places, sums, strict=True):
                    builder.store(load_vector(builder, place, types.float32, width), total)
                with cgutils.for_range(builder, rows) as loop:
                    at = builder.add(start, builder.mul(loop.index, stride))
                    for line in range(lines):
                        fetch(builder, builder.add(builder.add(at, ahead), I64(64 * line)))
                    weights = load_vector(builder, at, kind, width)
                    offset = builder.mul(loop.index, I64(4))
                    for value, total in zip(values, sums, strict=True):
                        factor = load_vector(builder, builder.add(value, offset), types.float32, 1)
                        product = builder.fmul(
                            weights, splat(builder, factor, width), flags=CONTRACT
                        )
                        added = builder.fadd(builder.load(total), product, flags=CONTRACT)
                        builder.store(added, total)
                for place, total in zip(places, sums, strict=True):
                    store_vector(builder, builder.load(total), place)

            with cgutils.for_range(builder, blocks) as loop:
                first = builder.mul(loop.index, I64(BLOCK))
                for column in range(0, BLOCK, width):
                    # Once a line, where the first of its columns are read.
                    begun, done = (c * bits_of(kind) // 8 for c in (column, column + width))
                    add(builder.add(first, I64(column)), -(-done // 64) - -(-begun // 64))
            return context.get_dummy_value()

        return types.void(dtype, *[types.int64] * 9), codegen

    return add_rows


# Up to so many tokens, weights are multiplied as they are read; fewer than a form takes, like whole
# tiles, leave garbage in the rows beyond theirs.
FEW = 8
add_to_2, add_to_5, add_to_8 = map(_adding_rows, (2, 5, FEW))


def _dotting(tokens: int) -> Any:
    """The intrinsic that multiplies rows with so many tokens."""
    rows = TOKENS // 3 if tokens <= 5 else TOKENS // 6  # sums that fill the registers

    @intrinsic
    def dot_rows(
        typingctx: Any, dtype: Any, base: Any, stride: Any, ahead: Any, x: Any, x_step: Any,
        lines: Any, to: Any, to_step: Any,
    ) -> Any:  # fmt: skip
        """to[t, :rows] = x[t] times the rows, over `lines` cache lines of each row.

        base, stride: address of the first row, and bytes from one to the next.
        ahead: bytes from a weight to the one that is fetched beside it.
        x, x_step, to, to_step: addresses of float32, and bytes to the next token.
        """
        kind = dtype.instance_type
        columns = 64 * 8 // bits_of(kind)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, base, stride, ahead, x, x_step, lines, to, to_step = args
            floats = many(F32, NARROW)
            starts = [builder.add(base, builder.mul(stride, I64(r))) for r in range(rows)]
            values = [builder.add(x, builder.mul(x_step, I64(t))) for t in range(tokens)]
            sums = [
                [cgutils.alloca_once_value(builder, constant(floats, 0.0)) for _ in starts]
                for _ in values
            ]
            with cgutils.for_range(builder, lines) as loop:
                line = builder.mul(loop.index, I64(64))
                for start in starts:
                    fetch(builder, builder.add(builder.add(start, line), ahead))
                first = builder.mul(loop.index, I64(4 * columns))
                for column in range(0, columns, NARROW):
                    at = builder.add(line, I64(column * bits_of(kind) // 8))
                    weights = [
                        load_vector(builder, builder.add(start, at), kind, NARROW)
                        for start in starts
                    ]
                    at = builder.add(first, I64(4 * column))
                    for value, totals in zip(values, sums, strict=True):
                        own = load_vector(builder, builder.add(value, at), types.float32, NARROW)
                        for row, total in zip(weights, totals, strict=True):
                            product = builder.fmul(row, own, flags=CONTRACT)
                            added = builder.fadd(builder.load(total), product, flags=CONTRACT)
                            builder.store(added, total)
            name = f"llvm.vector.reduce.fadd.{suffix(NARROW)}"
            for t, totals in enumerate(sums):
                place = builder.add(to, builder.mul(to_step, I64(t)))
                for r, total in enumerate(totals):
                    lanes = [F32(0.0), builder.load(total)]
                    value = call(builder, name, F32, lanes, fastmath=("reassoc",))
                    store_vector(builder, value, builder.add(place, I64(4 * r)))
            return context.get_dummy_value()

        return types.void(dtype, *[types.int64] * 8), codegen

    return rows, dot_rows


(ROWS_OF_5, dot_5), (ROWS_OF_8, dot_8) = map(_dotting, (5, FEW))
