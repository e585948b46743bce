"""What numba lacks: 16-bit loads from an address, a fast exponential, prefetch, atomics.

Weights are handed over as addresses, because bfloat16 is no type of numba's. A `dtype` argument
is one of HALF, BFLOAT, FLOAT, INT8 and INT4 and tells what an address points to; it is a type, so
that each is compiled into code of its own. Vectors are written out in LLVM's terms, which every
target understands: on x86 with F16C a load of 32 halves becomes four `vcvtph2ps`, without it a
slower sequence with the same result.

numba's cache on disk follows the file of the function that was called, not of those that it
calls: after a change here, touch compiled.py.
"""

from __future__ import annotations

import math
import platform
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
ROWS = 4

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()
_VECTOR = ir.VectorType(_F32, WIDTH)
_STORED = {
    types.float16: _F16, types.uint16: _I16, types.float32: _F32, types.int8: _I8, types.uint8: _I8
}  # fmt: skip
_CONTRACT = ("contract",)  # allow a multiply and an add to become one fused instruction


def _load(builder: Any, address: Any, dtype: Any, width: int) -> Any:
    """IR: `width` values at an address, as float32 (a vector, or a scalar for 1).

    A vector of INT4 has its even values before its odd ones, as a register of bytes falls apart.
    """

    def many(element: Any, count: int = width) -> Any:
        return element if count == 1 else ir.VectorType(element, count)

    def constant(value: int, count: int = width) -> Any:
        return _I32(value) if count == 1 else ir.Constant(many(_I32, count), [_I32(value)] * count)

    packed = 2 if dtype == types.uint8 and width > 1 else 1
    stored = many(_STORED[dtype], width // packed)
    loaded = builder.load(builder.inttoptr(address, stored.as_pointer()))
    loaded.align = 1  # a tensor of a memory-mapped file may start anywhere
    if dtype == types.float16:
        return builder.fpext(loaded, many(_F32))
    if dtype == types.uint16:
        wide = builder.zext(loaded, many(_I32))
        return builder.bitcast(builder.shl(wide, constant(16)), many(_F32))
    if dtype == types.int8:
        return builder.sitofp(builder.sext(loaded, many(_I32)), many(_F32))
    if packed == 2:
        half = width // 2
        pairs = builder.zext(loaded, many(_I32, half))
        even = builder.and_(pairs, constant(15, half))
        odd = builder.lshr(pairs, constant(4, half))
        order = ir.Constant(many(_I32), [_I32(i) for i in range(width)])
        return builder.sitofp(builder.shuffle_vector(even, odd, order), many(_F32))
    return loaded


def _store(builder: Any, value: Any, address: Any) -> None:
    stored = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    stored.align = 1


def _splat(builder: Any, value: Any) -> Any:
    """IR: a vector with `value` in every lane."""
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _I32(0))
    lanes = ir.Constant(ir.VectorType(_I32, WIDTH), [_I32(0)] * WIDTH)
    return builder.shuffle_vector(one, one, lanes)


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
    typingctx: Any, dtype: Any, rows: Any, at: Any, factors: Any, stride: Any, vectors: Any, to: Any
) -> Any:
    """`vectors` times WIDTH float32 at `to` += the sum of ROWS factors times what is in the rows.

    rows: address of 2 * ROWS addresses; the second half is only fetched into the cache.
    at: bytes from there to the first value.
    factors: address of float32 that are `stride` bytes apart.
    """
    kind = dtype.instance_type
    step = WIDTH * _bits(kind) // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, rows, at, factors, stride, vectors, to = args
        starts, weighs = [], []
        for i in range(2 * ROWS):
            pointer = builder.inttoptr(builder.add(rows, _I64(8 * i)), _I64.as_pointer())
            starts.append(builder.add(builder.load(pointer), at))
        for i in range(ROWS):
            address = builder.add(factors, builder.mul(stride, _I64(i)))
            weighs.append(_splat(builder, _load(builder, address, types.float32, 1)))
        with cgutils.for_range(builder, vectors) as loop:
            offset = builder.mul(loop.index, _I64(step))
            for start in starts[ROWS:]:
                _prefetch(builder, builder.add(start, offset))
            target = builder.add(to, builder.mul(loop.index, _I64(WIDTH * 4)))
            total = _load(builder, target, types.float32, WIDTH)
            for start, weigh in zip(starts, weighs, strict=False):
                weights = _load(builder, builder.add(start, offset), kind, WIDTH)
                product = builder.fmul(weights, weigh, flags=_CONTRACT)
                total = builder.fadd(total, product, flags=_CONTRACT)
            _store(builder, total, target)
        return context.get_dummy_value()

    return types.void(dtype, *[types.int64] * 6), codegen


@intrinsic
def interleave(typingctx: Any, address: Any) -> Any:
    """Bring WIDTH float32 that were summed up from INT4, even columns first, into their order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        split = _load(builder, args[0], types.float32, WIDTH)
        half = WIDTH // 2
        order = [_I32(i // 2 + half * (i % 2)) for i in range(WIDTH)]
        lanes = ir.Constant(ir.VectorType(_I32, WIDTH), order)
        _store(builder, builder.shuffle_vector(split, split, lanes), args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def dot_vectors(typingctx: Any, dtype: Any, row: Any, x: Any, vectors: Any) -> Any:
    """The sum of row[i] * x[i], float32 x, both by address, over `vectors` times WIDTH values."""
    row_step, x_step = WIDTH * dtype.instance_type.bitwidth // 8, WIDTH * 4

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, row, x, vectors = args
        total = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * WIDTH))
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
        total = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * WIDTH))
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
