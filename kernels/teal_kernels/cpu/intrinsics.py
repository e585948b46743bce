"""What numba lacks: 16-bit loads from an address, a fast exponential, prefetch, atomics.

Weights are handed over as addresses, because bfloat16 is no type of numba's. A `dtype` argument
is one of HALF, BFLOAT, FLOAT, INT8 and INT4 and tells what an address points to; it is a type, so
that each is compiled into code of its own. Vectors are written out in LLVM's terms, which every
target understands: on x86 with F16C a load of 32 halves becomes four `vcvtph2ps`, without it a
slower sequence with the same result.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# INT4 is unsigned, two values a byte, the even one in the low half.
HALF, BFLOAT, FLOAT, INT8, INT4 = np.float16, np.uint16, np.float32, np.int8, np.uint8
# Columns that one step of an inner loop takes: one cache line of 16-bit weights.
WIDTH = 32
# Rows that are added at a time.
ROWS = 8
# float32 in a register; all machines of today can do eight with one instruction or with two.
LANES = 8
# Columns that one step takes of INT4: eight, in 32 bits, a lane.
BLOCK = 8 * LANES

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()
_STORED = {
    types.float16: _F16,
    types.uint16: _I16,
    types.float32: _F32,
    types.int8: _I8,
    types.uint32: _I32,
}
_CONTRACT = ("contract",)  # allow a multiply and an add to become one fused instruction


def _many(element: Any, width: int) -> Any:
    """IR: the type of a vector, or of a scalar for 1."""
    return element if width == 1 else ir.VectorType(element, width)


def _load(builder: Any, address: Any, dtype: Any, width: int) -> Any:
    """IR: `width` values at an address, as float32 (or uint32, as they are)."""
    stored = _many(_STORED[dtype], width)
    loaded = builder.load(builder.inttoptr(address, stored.as_pointer()))
    loaded.align = 1  # a tensor of a memory-mapped file may start anywhere
    floats, ints = _many(_F32, width), _many(_I32, width)
    if dtype == types.float16:
        return builder.fpext(loaded, floats)
    if dtype == types.uint16:
        high = builder.shl(builder.zext(loaded, ints), _constant(ints, 16))
        return builder.bitcast(high, floats)
    if dtype == types.int8:
        return builder.sitofp(builder.sext(loaded, ints), floats)
    return loaded


def _store(builder: Any, value: Any, address: Any) -> None:
    stored = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    stored.align = 1


def _splat(builder: Any, value: Any, width: int = WIDTH) -> Any:
    """IR: a vector with `value` in every lane; `value` itself for a width of 1."""
    if width == 1:
        return value
    none = ir.Constant(_many(value.type, width), ir.Undefined)
    one = builder.insert_element(none, value, _I32(0))
    return builder.shuffle_vector(one, one, _indices([0] * width))


def _indices(lanes: Iterable[int]) -> Any:
    """IR: the lanes that a shuffle takes."""
    order = [_I32(lane) for lane in lanes]
    return ir.Constant(ir.VectorType(_I32, len(order)), order)


def _constant(kind: Any, value: float) -> Any:
    """IR: a scalar or vector of a type, with `value` in every lane."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [kind.element(value)] * kind.count)
    return kind(value)


def _suffix(width: int) -> str:
    """How LLVM's functions are called for that many float32."""
    return "f32" if width == 1 else f"v{width}f32"


def _by_width(
    builder: Any, count: Any, widths: tuple[int, ...], body: Callable[[Any, int], None]
) -> None:
    """IR: call body(index, width) over `count` values, the widest first; the last width is 1."""
    done = _I64(0)
    for width in widths:
        times = builder.sdiv(builder.sub(count, done), _I64(width))
        with cgutils.for_range(builder, times) as loop:
            body(builder.add(done, builder.mul(loop.index, _I64(width))), width)
        done = builder.add(done, builder.mul(times, _I64(width)))


def _starts(builder: Any, rows: Any, at: Any) -> list[Any]:
    """IR: the 2 * ROWS addresses at `rows`, each plus `at`."""
    pointers = (
        builder.inttoptr(builder.add(rows, _I64(8 * i)), _I64.as_pointer()) for i in range(2 * ROWS)
    )
    return [builder.add(builder.load(pointer), at) for pointer in pointers]


def _call(builder: Any, name: str, result: Any, arguments: list[Any], **flags: Any) -> Any:
    """IR: call one of LLVM's own functions."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments, **flags)


def _prefetch(builder: Any, address: Any) -> None:
    pointer = builder.inttoptr(address, _I8.as_pointer())
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, _I32(0), _I32(3), _I32(1)])


@intrinsic
def borrow(typingctx: Any, value: Any) -> Any:
    """The same arrays, in tuples of any depth, but without a count of who uses them.

    numba counts with atomic operations whenever it passes an array on; two threads that share one
    then wait for each other's. The caller owns them all.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _uncounted(context, builder, value, args[0])

    return value(value), codegen


def _uncounted(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value=value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        for i, part in enumerate(kind.types):
            old = builder.extract_value(value, i)
            value = builder.insert_value(value, _uncounted(context, builder, part, old), i)
    return value


def _bits(dtype: Any) -> int:
    return 4 if dtype == types.uint8 else int(dtype.bitwidth)


def _offset(builder: Any, address: Any, dtype: Any, index: Any) -> Any:
    """IR: the address of the value at an index; of INT4, of the byte that holds it."""
    bits = builder.mul(index, _I64(_bits(dtype)))
    return builder.add(address, builder.ashr(bits, _I64(3)))


@intrinsic
def address_of(typingctx: Any, dtype: Any, base: Any, index: Any) -> Any:
    """Where the value at an index is; even indices only of INT4."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _offset(builder, args[1], dtype.instance_type, args[2])

    return types.int64(dtype, types.int64, types.int64), codegen


@intrinsic
def load(typingctx: Any, dtype: Any, base: Any, index: Any) -> Any:
    """The value at an index from an address, as float32."""
    kind = dtype.instance_type

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, base, index = args
        address = _offset(builder, base, kind, index)
        if kind != types.uint8:
            return _load(builder, address, kind, 1)
        pair = builder.load(builder.inttoptr(address, _I8.as_pointer()))
        shift = builder.trunc(builder.shl(builder.and_(index, _I64(1)), _I64(2)), _I8)
        return builder.uitofp(builder.and_(builder.lshr(pair, shift), _I8(15)), _F32)

    return types.float32(dtype, types.int64, types.int64), codegen


@intrinsic
def store(typingctx: Any, dtype: Any, base: Any, index: Any, value: Any) -> Any:
    """Round a float32 to the nearest of a float dtype (ties to even) and store it at an index."""
    stored = _STORED[dtype.instance_type]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, base, index, value = args
        if stored is _F16:
            value = builder.fptrunc(value, _F16)
        elif stored is _I16:
            bits = builder.bitcast(value, _I32)
            odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
            rounded = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
            value = builder.trunc(builder.lshr(rounded, _I32(16)), _I16)
        _store(builder, value, _offset(builder, base, dtype.instance_type, index))
        return context.get_dummy_value()

    return types.void(dtype, types.int64, types.int64, types.float32), codegen


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
        starts = _starts(builder, rows, at)
        weighs = [
            _load(builder, builder.add(factors, _I64(4 * i)), types.float32, 1) for i in range(ROWS)
        ]

        def add(index: Any, width: int) -> None:
            offset = builder.mul(index, _I64(kind.bitwidth // 8))
            target = builder.add(to, builder.mul(index, _I64(4)))
            total = _load(builder, target, types.float32, width)
            for start, weigh in zip(starts, weighs, strict=False):
                weights = _load(builder, builder.add(start, offset), kind, width)
                product = builder.fmul(weights, _splat(builder, weigh, width), flags=_CONTRACT)
                total = builder.fadd(total, product, flags=_CONTRACT)
            for start in starts[ROWS:]:
                _prefetch(builder, builder.add(start, offset))
            _store(builder, total, target)

        _by_width(builder, count, (WIDTH, LANES, 1), add)
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
        starts = _starts(builder, rows, at)
        weighs = [
            _load(builder, builder.add(factors, _I64(4 * i)), types.float32, 1) for i in range(ROWS)
        ]
        row_bytes = builder.mul(groups, _I64(4))

        def scale(index: Any, width: int) -> None:
            floats, ints = _many(_F32, width), _many(_I32, width)
            offset = builder.mul(index, _I64(4))

            def place(base: Any, row: int) -> Any:
                return builder.add(base, builder.add(builder.mul(row_bytes, _I64(row)), offset))

            products, top = [], _constant(floats, 1e-30)
            for start in starts[ROWS:]:
                _prefetch(builder, builder.add(start, builder.mul(index, _I64(2))))
            for i, weigh in enumerate(weighs):
                at = builder.add(starts[i], builder.mul(index, _I64(2)))
                scales = _load(builder, at, types.float16, width)
                products.append(builder.fmul(scales, _splat(builder, weigh, width)))
                _store(builder, products[-1], place(scaled, i))
                size = _call(builder, f"llvm.fabs.{_suffix(width)}", floats, [products[-1]])
                top = builder.select(builder.fcmp_ordered(">", size, top), size, top)
            step = builder.fdiv(top, _constant(floats, 32767.0))
            _store(builder, step, place(steps, 0))
            whole = []
            for product in products:
                multiple = [builder.fdiv(product, step)]
                nearest = _call(builder, f"llvm.rint.{_suffix(width)}", floats, multiple)
                whole.append(builder.fptosi(nearest, ints))
            for i in range(0, ROWS, 2):
                low = builder.and_(whole[i], _constant(ints, 0xFFFF))
                high = builder.shl(whole[i + 1], _constant(ints, 16))
                _store(builder, builder.or_(low, high), place(pairs, i // 2))

        _by_width(builder, groups, (LANES, 1), scale)
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
    dwords, words = _many(_I32, LANES), _many(_I16, 2 * LANES)
    wide, floats = _many(_I32, 2 * LANES), _many(_F32, LANES)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, first, group, groups, pairs, steps, blocks, to = args
        starts = _starts(builder, rows, builder.lshr(first, _I64(1)))

        def halves(low: Any, high: Any) -> Any:
            """Words of `low` and of `high` by turns."""
            low, high = builder.bitcast(low, words), builder.bitcast(high, words)
            turns = (i + 2 * LANES * (i % 2) for i in range(2 * LANES))
            return builder.shuffle_vector(low, high, _indices(turns))

        def multiply_add(codes: Any, factor: Any) -> Any:
            product = builder.mul(builder.sext(codes, wide), builder.sext(factor, wide))
            even = builder.shuffle_vector(product, product, _indices(range(0, 2 * LANES, 2)))
            odd = builder.shuffle_vector(product, product, _indices(range(1, 2 * LANES, 2)))
            return builder.add(even, odd)

        with cgutils.for_range(builder, blocks) as loop:
            offset = builder.mul(loop.index, _I64(BLOCK // 2))
            for start in starts[ROWS:]:
                _prefetch(builder, builder.add(start, offset))
            column = builder.add(first, builder.mul(loop.index, _I64(BLOCK)))
            g = builder.mul(builder.udiv(column, group), _I64(4))
            sixteen = _constant(dwords, 16)
            totals = [_constant(dwords, 0)] * 8
            for i in range(0, ROWS, 2):
                at = builder.add(g, builder.mul(groups, _I64(2 * i)))
                pair = _load(builder, builder.add(pairs, at), types.uint32, 1)
                factor = builder.bitcast(_splat(builder, pair, LANES), words)
                a, b = (
                    _load(builder, builder.add(start, offset), types.uint32, LANES)
                    for start in starts[i : i + 2]
                )
                low = halves(a, builder.shl(b, sixteen))
                high = halves(builder.lshr(a, sixteen), b)
                for n in range(8):
                    codes = builder.lshr(high if n > 3 else low, _constant(words, 4 * (n % 4)))
                    codes = builder.and_(codes, _constant(words, 15))
                    totals[n] = builder.add(totals[n], multiply_add(codes, factor))
            step = _load(builder, builder.add(steps, g), types.float32, 1)
            for n, total in enumerate(totals):
                block = builder.mul(loop.index, _I64(4 * BLOCK))
                address = builder.add(builder.add(to, block), _I64(4 * LANES * n))
                product = builder.fmul(
                    builder.sitofp(total, floats), _splat(builder, step, LANES), flags=_CONTRACT
                )
                before = _load(builder, address, types.float32, LANES)
                _store(builder, builder.fadd(before, product, flags=_CONTRACT), address)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


@intrinsic
def in_order(typingctx: Any, address: Any) -> Any:
    """Bring BLOCK float32 that `add_codes` summed up into the order of their columns."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = _load(builder, args[0], types.float32, BLOCK)
        order = _indices(i // 8 + BLOCK // 8 * (i % 8) for i in range(BLOCK))
        _store(builder, builder.shuffle_vector(found, found, order), args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def dot_vectors(typingctx: Any, dtype: Any, row: Any, x: Any, vectors: Any) -> Any:
    """The sum of row[i] * x[i], float32 x, both by address, over `vectors` times WIDTH values."""
    row_step, x_step = WIDTH * dtype.instance_type.bitwidth // 8, WIDTH * 4

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, row, x, vectors = args
        total = cgutils.alloca_once_value(builder, _constant(_many(_F32, WIDTH), 0.0))
        with cgutils.for_range(builder, vectors) as loop:
            at = builder.add(row, builder.mul(loop.index, _I64(row_step)))
            weights = _load(builder, at, dtype.instance_type, WIDTH)
            at = builder.add(x, builder.mul(loop.index, _I64(x_step)))
            product = builder.fmul(
                weights, _load(builder, at, types.float32, WIDTH), flags=_CONTRACT
            )
            builder.store(builder.fadd(builder.load(total), product, flags=_CONTRACT), total)
        reduce = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
        lanes = [_F32(0.0), builder.load(total)]
        return _call(builder, reduce, _F32, lanes, fastmath=("reassoc",))

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
        total = cgutils.alloca_once_value(builder, _constant(_many(_F32, WIDTH), 0.0))
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(row, builder.mul(loop.index, stride))
            weights = _load(builder, at, dtype.instance_type, WIDTH)
            at = builder.add(factors, builder.mul(loop.index, _I64(4)))
            factor = _splat(builder, _load(builder, at, types.float32, 1))
            product = builder.fmul(weights, factor, flags=_CONTRACT)
            builder.store(builder.fadd(builder.load(total), product, flags=_CONTRACT), total)
        _store(builder, builder.load(total), to)
        return context.get_dummy_value()

    return types.void(dtype, *[types.int64] * 5), codegen


@intrinsic
def exp(typingctx: Any, x: Any) -> Any:
    """The exponential of a float32 to 2 ulp, for -87 <= x <= 88; beyond that, of those bounds.

    The library's is a call for each value. This becomes part of a loop, which LLVM then computes
    eight values at a time: 2^n times a polynomial in the rest, as in Moshier's Cephes.
    """
    polynomial = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
                  1.6666665459e-1, 5.0000001201e-1)  # fmt: skip

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def multiply_add(a: Any, b: Any, c: Any) -> Any:
            return builder.fadd(builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)

        x = args[0]
        for operator, bound in (("<", -87.0), (">", 88.0)):
            beyond = builder.fcmp_ordered(operator, x, _F32(bound))
            x = builder.select(beyond, _F32(bound), x)
        n = _call(builder, "llvm.rint.f32", _F32, [builder.fmul(x, _F32(1 / math.log(2)))])
        # ln 2 in two parts, the first short enough for n times it to be exact.
        rest = multiply_add(n, _F32(-0.693359375), x)
        rest = multiply_add(n, _F32(2.12194440e-4), rest)
        total = _F32(polynomial[0])
        for coefficient in polynomial[1:]:
            total = multiply_add(total, rest, _F32(coefficient))
        total = multiply_add(builder.fmul(total, rest), rest, rest)
        total = builder.fadd(total, _F32(1.0))
        power = builder.add(builder.fptosi(n, _I32), _I32(127))
        return builder.fmul(total, builder.bitcast(builder.shl(power, _I32(23)), _F32))

    return types.float32(types.float32), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Fetch the cache line at an address, which may lie outside of what is ours."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def atomic_add(typingctx: Any, address: Any) -> Any:
    """Add 1 to the int64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", builder.inttoptr(args[0], _I64.as_pointer()), _I64(1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    """The int64 at an address; what its writers did before they wrote it is visible after this."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that it spins."""
    machine = platform.machine().lower()

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if machine in ("x86_64", "amd64"):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif machine in ("aarch64", "arm64"):
            _call(builder, "llvm.aarch64.hint", ir.VoidType(), [_I32(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def give_way(typingctx: Any, function: Any) -> Any:
    """Call a C function without arguments by its address, unless that is 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.if_then(builder.icmp_unsigned("!=", args[0], _I64(0))):
            signature = ir.FunctionType(_I32, [])
            builder.call(builder.inttoptr(args[0], signature.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
