"""Intrinsics of a product for several tokens: rows of weights unpacked to floats, and tiles."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from teal_kernels.cpu.vectors import (
    CONTRACT,
    F32,
    I8,
    I32,
    I64,
    constant,
    fetch,
    indices,
    load_vector,
    many,
    offset_of,
    splat,
    store_vector,
)

FEATURES = frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
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


def _adding(tokens: int) -> Any:
    """The intrinsic that adds a product for that many tokens."""

    @intrinsic
    def add_tile(
        typingctx: Any, x: Any, x_step: Any, panel: Any, depth: Any, to: Any, to_step: Any
    ) -> Any:
        """to[t, :COLUMNS] += the sum of x[t, k] * panel[k] over `depth` k, for each token t.

        All are float32 and addresses. The sums stay in registers.

        x_step, to_step: bytes from a token to the next.
        panel: [depth, COLUMNS].
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_step, panel, depth, to, to_step = args
            values = [builder.add(x, builder.mul(x_step, I64(t))) for t in range(tokens)]
            targets = [builder.add(to, builder.mul(to_step, I64(t))) for t in range(tokens)]
            before = [load_vector(builder, at, types.float32, COLUMNS) for at in targets]
            sums = [cgutils.alloca_once_value(builder, vector) for vector in before]
            with cgutils.for_range(builder, depth) as loop:
                at = builder.add(panel, builder.mul(loop.index, I64(4 * COLUMNS)))
                weights = load_vector(builder, at, types.float32, COLUMNS)
                offset = builder.mul(loop.index, I64(4))
                for value, total in zip(values, sums, strict=True):
                    factor = load_vector(builder, builder.add(value, offset), types.float32, 1)
                    product = builder.fmul(weights, splat(builder, factor, COLUMNS), flags=CONTRACT)
                    builder.store(builder.fadd(builder.load(total), product, flags=CONTRACT), total)
            for target, total in zip(targets, sums, strict=True):
                store_vector(builder, builder.load(total), target)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return add_tile


add_tile, add_half_tile, add_quarter_tile = map(_adding, (TOKENS, TOKENS // 2, TOKENS // 4))
