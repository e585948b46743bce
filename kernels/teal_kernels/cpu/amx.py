"""Products on x86's matrix units (AMX), which multiply bfloat16 and add in float32.

A float32 is handed to them as two bfloat16, the second of which is what the first leaves over:
together they hold 16 bits of its fraction, 32 times as fine as float16. A float16 is exact in two,
a bfloat16 in one. The product of two second parts, below 2^-16, is left out.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from teal_kernels.cpu.tiles import FEATURES
from teal_kernels.cpu.vectors import (
    F32,
    I8,
    I16,
    I32,
    I64,
    call,
    constant,
    fetch,
    load_vector,
    many,
    offset_of,
    store_vector,
)

# Tokens and columns of a tile, and the inputs that one instruction sums up, two of them a lane.
SIDE, STEP = 16, 32
# arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: Linux wants to be asked once a process.
_ASK = (158, 0x1023, 18)


@cache
def usable() -> bool:
    """Whether the CPU has the units, and the system lets this process use them."""
    if not {"+amx-tile", "+amx-bf16", "+avx512f"} <= FEATURES or sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None).syscall(*_ASK) == 0)
    except (AttributeError, OSError):
        return False


def configuration() -> Any:
    """What makes all eight tiles SIDE rows of 64 bytes; behind it, room for what was before."""
    found = np.zeros(128, dtype=np.uint8)
    found[0] = 1  # the palette
    found[16:32].view(np.uint16)[:] = 64
    found[48:56] = SIDE
    return found


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I8.as_pointer())


def move(builder: Any, name: str, tile: int, address: Any, step: Any) -> None:
    """IR: load a tile from an address, or store it there, its rows `step` bytes apart."""
    arguments = [I8(tile), _pointer(builder, address), step]
    call(builder, f"llvm.x86.{name}64", ir.VoidType(), arguments)


@intrinsic
def configure(typingctx: Any, address: Any) -> Any:
    """Set the tiles up by the 64 bytes at an address, and keep what was before behind them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        before = _pointer(builder, builder.add(args[0], I64(64)))
        call(builder, "llvm.x86.sttilecfg", ir.VoidType(), [before])
        call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [_pointer(builder, args[0])])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def restore(typingctx: Any, address: Any) -> Any:
    """Undo `configure`: torch's own products use the tiles on the same threads."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        before = _pointer(builder, builder.add(args[0], I64(64)))
        call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [before])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _parts(builder: Any, value: Any, width: int) -> tuple[Any, Any]:
    """IR: the bits of the first part, and those of the second, each in a value's upper half.

    The first is cut off, so that NaN stays NaN; the second is rounded.
    """
    ints = many(I32, width)
    upper = constant(ints, 0xFFFF0000)
    first = builder.and_(builder.bitcast(value, ints), upper)
    rest = builder.fsub(value, builder.bitcast(first, many(F32, width)))
    second = builder.add(builder.bitcast(rest, ints), constant(ints, 0x8000))
    return first, builder.and_(second, upper)


@intrinsic
def split(typingctx: Any, value: Any) -> Any:
    """A float32 as two bfloat16, their bits as uint16."""
    result = types.UniTuple(types.uint16, 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        halves = [
            builder.trunc(builder.lshr(part, I32(16)), I16) for part in _parts(builder, args[0], 1)
        ]
        return context.make_tuple(builder, result, halves)

    return result(types.float32), codegen


def _store_pairs(builder: Any, pair: list[Any], width: int, to: Any, low: Any | None) -> None:
    """IR: two inputs' weights, lane by lane side by side: first parts at `to`, second at `low`."""
    sixteen = constant(many(I32, width), 16)
    split_pair = [_parts(builder, weights, width) for weights in pair]
    for (even, odd), address in zip(zip(*split_pair, strict=True), (to, low), strict=True):
        if address is not None:
            store_vector(builder, builder.or_(builder.lshr(even, sixteen), odd), address)


def _has_second(kind: Any) -> bool:
    """Whether weights of a dtype need a second part."""
    return bool(kind == types.float16)


@intrinsic
def unpack_pairs(
    typingctx: Any, dtype: Any, row: Any, stride: Any, first: Any, panels: Any, ahead: Any,
    to: Any, step: Any, second: Any,
) -> Any:  # fmt: skip
    """Store two rows' columns from `first` on as `add_tile` reads them, in panels of SIDE each.

    row, stride: address of the first row, and bytes to the other one.
    ahead: bytes to rows that are fetched meanwhile.
    step, second: bytes from a panel to the next, and from first parts to second ones.
    """
    kind = dtype.instance_type

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, row, stride, first, panels, ahead, to, step, second = args
        with cgutils.for_range(builder, panels) as loop:
            column = builder.add(first, builder.mul(loop.index, I64(SIDE)))
            address = offset_of(builder, row, kind, column)
            pair = []
            for place in (address, builder.add(address, stride)):
                fetch(builder, builder.add(place, ahead))
                pair.append(load_vector(builder, place, kind, SIDE))
            at = builder.add(to, builder.mul(loop.index, step))
            low = builder.add(at, second) if _has_second(kind) else None
            _store_pairs(builder, pair, SIDE, at, low)
        return context.get_dummy_value()

    return types.void(dtype, *[types.int64] * 8), codegen


@intrinsic
def store_pair(typingctx: Any, a: Any, b: Any, to: Any, low: Any) -> Any:
    """Store a single column's two weights, float32, first parts at `to` and second at `low`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, to, low = args
        _store_pairs(builder, [a, b], 1, to, low)
        return context.get_dummy_value()

    return types.void(types.float32, types.float32, types.int64, types.int64), codegen


def _adding(tiles: int) -> Any:
    """The intrinsic that adds a product for SIDE tokens times so many tiles, 1 or 2."""

    @intrinsic
    def add_tiles(
        typingctx: Any, dtype: Any, x: Any, x_step: Any, x_low: Any,
        panel: Any, panel_step: Any, low: Any, steps: Any, to: Any, to_step: Any,
    ) -> Any:  # fmt: skip
        """to[t, :2 * SIDE] += the sum of x[t, k] times two panels over `steps` times STEP k.

        x, x_step: address of [inputs / STEP, SIDE, STEP] bfloat16, and bytes to the next tokens.
        panel, panel_step: address of [inputs / 2, SIDE, 2] bfloat16, and bytes to the second.
        x_low, low: bytes from first parts to second ones.
        """
        passes = [(False, False), (True, False)]
        if _has_second(dtype.instance_type):
            passes.append((False, True))

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, x, x_step, x_low, panel, panel_step, low, steps, to, to_step = args

            def sums(name: str) -> None:
                for i in range(tiles):
                    row = builder.add(to, builder.mul(to_step, I64(SIDE * i)))
                    for j in range(2):
                        move(builder, name, 2 * i + j, builder.add(row, I64(64 * j)), to_step)

            sums("tileloadd")
            with cgutils.for_range(builder, steps) as loop:
                column = builder.add(x, builder.mul(loop.index, I64(2 * SIDE * STEP)))
                weights = builder.add(panel, builder.mul(loop.index, I64(64 * STEP // 2)))
                for second_x, second in passes:
                    if not second_x:
                        for j in range(2):
                            at = builder.add(weights, low) if second else weights
                            at = builder.add(at, panel_step) if j else at
                            move(builder, "tileloadd", 6 + j, at, I64(64))
                    for i in range(tiles):
                        at = builder.add(column, builder.mul(x_step, I64(i)))
                        at = builder.add(at, x_low) if second_x else at
                        move(builder, "tileloadd", 4 + i, at, I64(2 * STEP))
                    for i in range(tiles):
                        for j in range(2):
                            operands = [I8(2 * i + j), I8(4 + i), I8(6 + j)]
                            call(builder, "llvm.x86.tdpbf16ps", ir.VoidType(), operands)
            sums("tilestored")
            return context.get_dummy_value()

        return types.void(dtype, *[types.int64] * 9), codegen

    return add_tiles


add_tile, add_two_tiles = _adding(1), _adding(2)
