"""What numba lacks: 16-bit loads from an address, a fast exponential, prefetch, atomics.

Weights are handed over as addresses, because bfloat16 is no type of numba's. A `dtype` argument
is one of HALF, BFLOAT, FLOAT, INT8 and INT4 and tells what an address points to; it is a type, so
that each is compiled into code of its own.
"""

from __future__ import annotations

import math
import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from teal_kernels.cpu.team import FUTEX
from teal_kernels.cpu.vectors import (
    CONTRACT,
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    STORED,
    call,
    fetch,
    load_vector,
    offset_of,
    store_vector,
)


@intrinsic
def address_of(typingctx: Any, dtype: Any, base: Any, index: Any) -> Any:
    """Where the value at an index is; even indices only of INT4."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return offset_of(builder, args[1], dtype.instance_type, args[2])

    return types.int64(dtype, types.int64, types.int64), codegen


@intrinsic
def load(typingctx: Any, dtype: Any, base: Any, index: Any) -> Any:
    """The value at an index from an address, as float32."""
    kind = dtype.instance_type

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, base, index = args
        address = offset_of(builder, base, kind, index)
        if kind != types.uint8:
            return load_vector(builder, address, kind, 1)
        pair = builder.load(builder.inttoptr(address, I8.as_pointer()))
        shift = builder.trunc(builder.shl(builder.and_(index, I64(1)), I64(2)), I8)
        return builder.uitofp(builder.and_(builder.lshr(pair, shift), I8(15)), F32)

    return types.float32(dtype, types.int64, types.int64), codegen


@intrinsic
def load_address(typingctx: Any, base: Any, index: Any) -> Any:
    """The address at an index from an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = builder.add(args[0], builder.mul(args[1], I64(8)))
        return builder.load(builder.inttoptr(at, I64.as_pointer()))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def store(typingctx: Any, dtype: Any, base: Any, index: Any, value: Any) -> Any:
    """Round a float32 to the nearest of a float dtype (ties to even) and store it at an index."""
    stored = STORED[dtype.instance_type]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, base, index, value = args
        if stored is F16:
            value = builder.fptrunc(value, F16)
        elif stored is I16:
            bits = builder.bitcast(value, I32)
            odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
            rounded = builder.add(builder.add(bits, I32(0x7FFF)), odd)
            value = builder.trunc(builder.lshr(rounded, I32(16)), I16)
        store_vector(builder, value, offset_of(builder, base, dtype.instance_type, index))
        return context.get_dummy_value()

    return types.void(dtype, types.int64, types.int64, types.float32), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Bring the cache line at an address, which may lie outside of what is ours."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        fetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


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
            return builder.fadd(builder.fmul(a, b, flags=CONTRACT), c, flags=CONTRACT)

        x = args[0]
        for operator, bound in (("<", -87.0), (">", 88.0)):
            beyond = builder.fcmp_ordered(operator, x, F32(bound))
            x = builder.select(beyond, F32(bound), x)
        n = call(builder, "llvm.rint.f32", F32, [builder.fmul(x, F32(1 / math.log(2)))])
        # ln 2 in two parts, the first short enough for n times it to be exact.
        rest = multiply_add(n, F32(-0.693359375), x)
        rest = multiply_add(n, F32(2.12194440e-4), rest)
        total = F32(polynomial[0])
        for coefficient in polynomial[1:]:
            total = multiply_add(total, rest, F32(coefficient))
        total = multiply_add(builder.fmul(total, rest), rest, rest)
        total = builder.fadd(total, F32(1.0))
        power = builder.add(builder.fptosi(n, I32), I32(127))
        return builder.fmul(total, builder.bitcast(builder.shl(power, I32(23)), F32))

    return types.float32(types.float32), codegen


@intrinsic
def atomic_add(typingctx: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address, in one order for all threads; what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", address, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    """The int64 at an address; what its writers did before they wrote it is visible after this."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that it spins."""
    machine = platform.machine().lower()

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if machine in ("x86_64", "amd64"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif machine in ("aarch64", "arm64"):
            call(builder, "llvm.aarch64.hint", ir.VoidType(), [I32(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def give_way(typingctx: Any, function: Any) -> Any:
    """Call a C function without arguments by its address, unless that is 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.if_then(builder.icmp_unsigned("!=", args[0], I64(0))):
            signature = ir.FunctionType(I32, [])
            builder.call(builder.inttoptr(args[0], signature.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def futex(typingctx: Any, syscall: Any, address: Any, operation: Any, value: Any) -> Any:
    """Linux's futex on the lower half of the int64 at an address, by libc's `syscall`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        syscall, address, operation, value = args
        signature = ir.FunctionType(I64, [I64], var_arg=True)
        number = I64(FUTEX.get(platform.machine(), 0))
        no_timeout = I64(0)
        builder.call(
            builder.inttoptr(syscall, signature.as_pointer()),
            [number, address, operation, value, no_timeout],
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen
