"""LLVM's terms for the intrinsics: types, and instructions on several values at once.

Vectors are written out in LLVM's terms, which every target understands: on x86 with F16C a load of
32 halves becomes four `vcvtph2ps`, without it a slower sequence with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

# INT4 is unsigned, two values a byte, the even one in the low half.
HALF, BFLOAT, FLOAT, INT8, INT4 = np.float16, np.uint16, np.float32, np.int8, np.uint8
# Columns that one step of an inner loop takes: one cache line of 16-bit weights.
WIDTH = 32
# Rows that are added at a time.
ROWS = 8
# Bytes of weights that are on their way while others are added, at least.
AHEAD = 6144
# Rows whose products with the same vector are summed at a time, and the partial sums of each.
DOTS, SUMS = 4, 16
# The least columns that one step takes of INT4: eight, in 32 bits, a lane.
BLOCK = 64

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
STORED = {
    types.float16: F16,
    types.uint16: I16,
    types.float32: F32,
    types.int8: I8,
    types.uint32: I32,
}
CONTRACT = ("contract",)  # allow a multiply and an add to become one fused instruction


def features_of(context: Any) -> set[str]:
    """What the CPU can do, by LLVM's names with a plus before them."""
    _, _, features = context.codegen().magic_tuple()
    return set(features.split(","))


def registers(context: Any) -> tuple[int, ...]:
    """Lanes of 32 bits of the registers that are worth using, the widest first.

    All machines of today can do eight with one instruction or with two.
    """
    return (16, 8) if "+avx512bw" in features_of(context) else (8,)


def many(element: Any, width: int) -> Any:
    """IR: the type of a vector, or of a scalar for 1."""
    return element if width == 1 else ir.VectorType(element, width)


def load_vector(builder: Any, address: Any, dtype: Any, width: int) -> Any:
    """IR: `width` values at an address, as float32 (or uint32, as they are)."""
    stored = many(STORED[dtype], width)
    loaded = builder.load(builder.inttoptr(address, stored.as_pointer()))
    loaded.align = 1  # a tensor of a memory-mapped file may start anywhere
    floats, ints = many(F32, width), many(I32, width)
    if dtype == types.float16:
        return builder.fpext(loaded, floats)
    if dtype == types.uint16:
        high = builder.shl(builder.zext(loaded, ints), constant(ints, 16))
        return builder.bitcast(high, floats)
    if dtype == types.int8:
        return builder.sitofp(builder.sext(loaded, ints), floats)
    return loaded


def load_as(builder: Any, address: Any, element: Any, width: int) -> Any:
    """IR: a vector as it is in memory."""
    loaded = builder.load(builder.inttoptr(address, many(element, width).as_pointer()))
    loaded.align = 1
    return loaded


def store_vector(builder: Any, value: Any, address: Any) -> None:
    """IR: store a vector or scalar at an address."""
    stored = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    stored.align = 1


def bits_of(dtype: Any) -> int:
    """Bits of one value in memory."""
    return 4 if dtype == types.uint8 else int(dtype.bitwidth)


def offset_of(builder: Any, address: Any, dtype: Any, index: Any) -> Any:
    """IR: the address of the value at an index; of INT4, of the byte that holds it."""
    distance = builder.mul(index, I64(bits_of(dtype)))
    return builder.add(address, builder.ashr(distance, I64(3)))


def splat(builder: Any, value: Any, width: int = WIDTH) -> Any:
    """IR: a vector with `value` in every lane; `value` itself for a width of 1."""
    if width == 1:
        return value
    none = ir.Constant(many(value.type, width), ir.Undefined)
    one = builder.insert_element(none, value, I32(0))
    return builder.shuffle_vector(one, one, indices([0] * width))


def indices(lanes: Iterable[int]) -> Any:
    """IR: the lanes that a shuffle takes."""
    order = [I32(lane) for lane in lanes]
    return ir.Constant(ir.VectorType(I32, len(order)), order)


def constant(kind: Any, value: float) -> Any:
    """IR: a scalar or vector of a type, with `value` in every lane."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [kind.element(value)] * kind.count)
    return kind(value)


def suffix(width: int) -> str:
    """How LLVM's functions are called for that many float32."""
    return "f32" if width == 1 else f"v{width}f32"


def turned(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """IR: as many vectors as each has lanes, a power of two → their columns as vectors."""
    found, half = list(rows), len(rows) // 2
    while half:
        low, high = (
            [
                lane + shift if bool(lane & half) == swapped else lane + other
                for lane in range(len(rows))
            ]
            for swapped, shift, other in ((True, len(rows) - half, 0), (False, half, len(rows)))
        )
        for i in range(len(rows)):
            if not i & half:
                a, b = found[i], found[i + half]
                found[i] = builder.shuffle_vector(a, b, indices(low))
                found[i + half] = builder.shuffle_vector(a, b, indices(high))
        half //= 2
    return found


def by_width(
    builder: Any, count: Any, widths: Sequence[int], body: Callable[[Any, int], None]
) -> None:
    """IR: call body(index, width) over `count` values: the widest first, the last for the rest."""
    done = I64(0)
    for width in widths:
        times = builder.sdiv(builder.sub(count, done), I64(width))
        with cgutils.for_range(builder, times) as loop:
            body(builder.add(done, builder.mul(loop.index, I64(width))), width)
        done = builder.add(done, builder.mul(times, I64(width)))


def call(builder: Any, name: str, result: Any, arguments: list[Any], **flags: Any) -> Any:
    """IR: call one of LLVM's own functions."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments, **flags)


def fetch(builder: Any, address: Any) -> None:
    """IR: bring the cache line at an address, which may lie outside of what is ours."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32(0), I32(3), I32(1)])


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
