"""What numba lacks: 16-bit loads from an address, a fast exponential, prefetch, atomics.

Weights are handed over as addresses, because bfloat16 is no type of numba's. A `dtype` argument
is one of HALF, BFLOAT and FLOAT and tells what an address points to; it is a type, so that each
is compiled into code of its own. Vectors are written out in LLVM's terms, which every target
understands: on x86 with F16C a load of 32 halves becomes four `vcvtph2ps`, without it a slower
sequence with the same result.

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

HALF, BFLOAT, FLOAT = np.float16, np.uint16, np.float32
# Columns that one step of an inner loop takes: one cache line of 16-bit weights.
WIDTH = 32

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()
_VECTOR = ir.VectorType(_F32, WIDTH)
_STORED = {types.float16: _F16, types.uint16: _I16, types.float32: _F32}
_CONTRACT = ("contract",)  # allow a multiply and an add to become one fused instruction


def _load(builder: Any, address: Any, stored: Any, width: int) -> Any:
    """IR: `width` stored values at an address, as float32 (a vector, or a scalar for 1)."""

    def many(element: Any) -> Any:
        return element if width == 1 else ir.VectorType(element, width)

    loaded = builder.load(builder.inttoptr(address, many(stored).as_pointer()))
    loaded.align = 1  # a tensor of a memory-mapped file may start anywhere
    if stored is _F16:
        return builder.fpext(loaded, many(_F32))
    if stored is _I16:
        sixteen = _I32(16) if width == 1 else ir.Constant(many(_I32), [_I32(16)] * width)
        return builder.bitcast(builder.shl(builder.zext(loaded, many(_I32)), sixteen), many(_F32))
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


@intrinsic
def item_bytes(typingctx: Any, dtype: Any) -> Any:
    """Bytes of one value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _I64(dtype.instance_type.bitwidth // 8)

    return types.int64(dtype), codegen


@intrinsic
def load(typingctx: Any, dtype: Any, address: Any) -> Any:
    """The value at an address, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, args[1], _STORED[dtype.instance_type], 1)

    return types.float32(dtype, types.int64), codegen


@intrinsic
def store(typingctx: Any, dtype: Any, address: Any, value: Any) -> Any:
    """Round a float32 to the nearest of the dtype (ties to even) and store it at an address."""
    stored = _STORED[dtype.instance_type]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[2]
        if stored is _F16:
            value = builder.fptrunc(value, _F16)
        elif stored is _I16:
            bits = builder.bitcast(value, _I32)
            odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
            rounded = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
            value = builder.trunc(builder.lshr(rounded, _I32(16)), _I16)
        _store(builder, value, args[1])
        return context.get_dummy_value()

    return types.void(dtype, types.int64, types.float32), codegen


@intrinsic
def add_four_rows(
    typingctx: Any, dtype: Any, to: Any, w0: Any, w1: Any, w2: Any, w3: Any,
    x0: Any, x1: Any, x2: Any, x3: Any,
) -> Any:  # fmt: skip
    """WIDTH float32 at the address `to` += x0 * those at w0 + ... + x3 * those at w3."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, rows, factors = args[1], args[2:6], args[6:]
        total = _load(builder, to, _F32, WIDTH)
        for row, factor in zip(rows, factors, strict=True):
            weights = _load(builder, row, _STORED[dtype.instance_type], WIDTH)
            product = builder.fmul(weights, _splat(builder, factor), flags=_CONTRACT)
            total = builder.fadd(total, product, flags=_CONTRACT)
        _store(builder, total, to)
        return context.get_dummy_value()

    return types.void(dtype, *[types.int64] * 5, *[types.float32] * 4), codegen


@intrinsic
def dot_vectors(typingctx: Any, dtype: Any, row: Any, x: Any, vectors: Any) -> Any:
    """The sum of row[i] * x[i], float32 x, both by address, over `vectors` times WIDTH values."""
    stored = _STORED[dtype.instance_type]
    row_step, x_step = WIDTH * dtype.instance_type.bitwidth // 8, WIDTH * 4

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, row, x, vectors = args
        total = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * WIDTH))
        with cgutils.for_range(builder, vectors) as loop:
            at = builder.add(row, builder.mul(loop.index, _I64(row_step)))
            weights = _load(builder, at, stored, WIDTH)
            at = builder.add(x, builder.mul(loop.index, _I64(x_step)))
            product = builder.fmul(weights, _load(builder, at, _F32, WIDTH), flags=_CONTRACT)
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
            weights = _load(builder, at, _STORED[dtype.instance_type], WIDTH)
            at = builder.add(factors, builder.mul(loop.index, _I64(4)))
            factor = _splat(builder, _load(builder, at, _F32, 1))
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
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, _I32(0), _I32(3), _I32(1)])
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
