# mypy: allow-untyped-defs
# numba infers the types of compiled functions.
"""The compiled half of the CPU kernels: everything that numba turns into machine code.

One file on purpose: numba's cache on disk is renewed when the file that holds a function
changes, but not when a function that it calls changes elsewhere.

Weights are handed over as addresses, because float16 and bfloat16 are no types of numba's.
`kind` is the dtype of what an address points to: HALF, BFLOAT or FLOAT. Vectors are written out
in LLVM's terms, which every target understands: on x86 with F16C a load of 16 halves becomes two
`vcvtph2ps`, without it a slower sequence with the same result.
"""

from __future__ import annotations

import math
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

HALF, BFLOAT, FLOAT = 0, 1, 2
_ITEM_BYTES = (2, 2, 4)
# Columns that one step of the inner loop computes: one cache line of 16-bit weights.
_WIDTH = 32

_F32, _I64 = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, _WIDTH)
_CONTRACT = ("contract",)  # allow a multiply and an add to become one fused instruction


def _load(builder: Any, address: Any, kind: int, width: int) -> Any:
    """IR: `width` values of a kind at an address, as float32 (a vector, or a scalar for 1)."""

    def many(element: Any) -> Any:
        return element if width == 1 else ir.VectorType(element, width)

    stored = many((ir.HalfType(), ir.IntType(16), _F32)[kind])
    loaded = builder.load(builder.inttoptr(address, stored.as_pointer()))
    loaded.align = _ITEM_BYTES[kind]
    if kind == HALF:
        return builder.fpext(loaded, many(_F32))
    if kind == BFLOAT:
        sixteen = ir.Constant(ir.IntType(32), 16)
        shift = sixteen if width == 1 else ir.Constant(many(ir.IntType(32)), [sixteen] * width)
        wide = builder.shl(builder.zext(loaded, many(ir.IntType(32))), shift)
        return builder.bitcast(wide, many(_F32))
    return loaded


def _store(builder: Any, value: Any, address: Any) -> None:
    stored = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    stored.align = 4


def _splat(builder: Any, value: Any) -> Any:
    """IR: a vector with `value` in every lane."""
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.IntType(32)(0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), _WIDTH), [ir.IntType(32)(0)] * _WIDTH)
    return builder.shuffle_vector(one, one, mask)


def _load_scalar(kind: int) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _load(builder, args[0], kind, 1)

        return types.float32(types.int64), codegen

    return load


def _store_scalar(kind: int) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address, value = args
            if kind == HALF:
                value = builder.fptrunc(value, ir.HalfType())
            elif kind == BFLOAT:  # round to nearest, ties to even
                bits = builder.bitcast(value, ir.IntType(32))
                odd = builder.and_(builder.lshr(bits, bits.type(16)), bits.type(1))
                rounded = builder.add(builder.add(bits, bits.type(0x7FFF)), odd)
                value = builder.trunc(builder.lshr(rounded, bits.type(16)), ir.IntType(16))
            stored = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
            stored.align = _ITEM_BYTES[kind]
            return context.get_dummy_value()

        return types.void(types.int64, types.float32), codegen

    return store


def _add_four_rows(kind: int) -> Any:
    @intrinsic
    def add(
        typingctx: Any, acc: Any, w0: Any, w1: Any, w2: Any, w3: Any,
        x0: Any, x1: Any, x2: Any, x3: Any,
    ) -> Any:  # fmt: skip
        """acc[0:WIDTH] += x0 * w0[0:WIDTH] + ... + x3 * w3[0:WIDTH]."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            acc, rows, factors = args[0], args[1:5], args[5:]
            total = _load(builder, acc, FLOAT, _WIDTH)
            for row, factor in zip(rows, factors, strict=True):
                weights = _load(builder, row, kind, _WIDTH)
                product = builder.fmul(weights, _splat(builder, factor), flags=_CONTRACT)
                total = builder.fadd(total, product, flags=_CONTRACT)
            _store(builder, total, acc)
            return context.get_dummy_value()

        address, value = types.int64, types.float32
        return types.void(*[address] * 5, *[value] * 4), codegen

    return add


def _dot_product(kind: int) -> Any:
    @intrinsic
    def dot(typingctx: Any, row: Any, x: Any, vectors: Any) -> Any:
        """The sum of row[i] * x[i] over `vectors` times WIDTH elements."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            row, x, vectors = args
            total = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * _WIDTH))
            with cgutils.for_range(builder, vectors) as loop:
                offset = builder.mul(loop.index, _I64(_WIDTH * _ITEM_BYTES[kind]))
                weights = _load(builder, builder.add(row, offset), kind, _WIDTH)
                offset = builder.mul(loop.index, _I64(_WIDTH * 4))
                values = _load(builder, builder.add(x, offset), FLOAT, _WIDTH)
                product = builder.fmul(weights, values, flags=_CONTRACT)
                builder.store(builder.fadd(builder.load(total), product, flags=_CONTRACT), total)
            name = f"llvm.vector.reduce.fadd.v{_WIDTH}f32"
            signature_ = ir.FunctionType(_F32, [_F32, _VECTOR])
            reduce = cgutils.get_or_insert_function(builder.module, signature_, name)
            return builder.call(reduce, [_F32(0.0), builder.load(total)], fastmath=("reassoc",))

        return types.float32(types.int64, types.int64, types.int64), codegen

    return dot


_load_half, _load_bfloat, _load_float = (_load_scalar(kind) for kind in (HALF, BFLOAT, FLOAT))
_store_half, _store_bfloat, _store_float = (_store_scalar(kind) for kind in (HALF, BFLOAT, FLOAT))
_add_half, _add_bfloat, _add_float = (_add_four_rows(kind) for kind in (HALF, BFLOAT, FLOAT))
_dot_half, _dot_bfloat, _dot_float = (_dot_product(kind) for kind in (HALF, BFLOAT, FLOAT))


@intrinsic
def _prefetch(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        i32 = ir.IntType(32)
        signature_ = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(builder.module, signature_, "llvm.prefetch.p0")
        builder.call(prefetch, [builder.inttoptr(args[0], pointer), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _atomic_add(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        builder.atomic_rmw("add", pointer, _I64(1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _atomic_load(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tell the core that it spins."""
    hints: dict[str, tuple[str, list[Any]]] = {
        "x86_64": ("llvm.x86.sse2.pause", []),
        "AMD64": ("llvm.x86.sse2.pause", []),
    }
    hints |= {name: ("llvm.aarch64.hint", [ir.IntType(32)(1)]) for name in ("aarch64", "arm64")}

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if hint := hints.get(platform.machine()):
            name, values = hint
            signature_ = ir.FunctionType(ir.VoidType(), [value.type for value in values])
            function = cgutils.get_or_insert_function(builder.module, signature_, name)
            builder.call(function, values)
        return context.get_dummy_value()

    return types.void(), codegen


@njit(nogil=True, cache=True)
def _load_at(kind, address):
    if kind == HALF:
        return _load_half(address)
    if kind == BFLOAT:
        return _load_bfloat(address)
    return _load_float(address)


@njit(nogil=True, cache=True)
def _store_at(kind, address, value):
    if kind == HALF:
        _store_half(address, value)
    elif kind == BFLOAT:
        _store_bfloat(address, value)
    else:
        _store_float(address, value)


@njit(nogil=True, cache=True)
def _dot(kind, row, x, size):
    """The product of a row of weights and a float32 vector, both addresses."""
    vectors = size // _WIDTH
    if kind == HALF:
        total = _dot_half(row, x, vectors)
    elif kind == BFLOAT:
        total = _dot_bfloat(row, x, vectors)
    else:
        total = _dot_float(row, x, vectors)
    item = 4 if kind == FLOAT else 2
    for i in range(vectors * _WIDTH, size):
        total += _load_at(kind, row + i * item) * _load_float(x + i * 4)
    return total


@njit(nogil=True, cache=True)
def _add_rows(kind, base, stride, rows, factors, first, count, acc, columns):
    """acc[0:columns] += the sum of factors[r] * row r, four rows at a time.

    A row is `columns` elements at base + rows[r] * stride bytes; r runs from `first` over
    `count`. While four rows are added, the next four are fetched: what the survivors are can not
    be guessed by a prefetcher.
    """
    item = 4 if kind == FLOAT else 2
    vectors = columns // _WIDTH
    last = first + count - 1
    for r in range(first, first + count, 4):
        r1, r2, r3 = min(r + 1, last), min(r + 2, last), min(r + 3, last)
        w0, w1 = base + rows[r] * stride, base + rows[r1] * stride
        w2, w3 = base + rows[r2] * stride, base + rows[r3] * stride
        n0, n1 = base + rows[min(r + 4, last)] * stride, base + rows[min(r + 5, last)] * stride
        n2, n3 = base + rows[min(r + 6, last)] * stride, base + rows[min(r + 7, last)] * stride
        x0, zero = factors[r], np.float32(0)
        x1 = factors[r1] if r + 1 <= last else zero
        x2 = factors[r2] if r + 2 <= last else zero
        x3 = factors[r3] if r + 3 <= last else zero
        for v in range(vectors):
            at = v * _WIDTH * item
            _prefetch(n0 + at)
            _prefetch(n1 + at)
            _prefetch(n2 + at)
            _prefetch(n3 + at)
            to = acc + v * _WIDTH * 4
            if kind == HALF:
                _add_half(to, w0 + at, w1 + at, w2 + at, w3 + at, x0, x1, x2, x3)
            elif kind == BFLOAT:
                _add_bfloat(to, w0 + at, w1 + at, w2 + at, w3 + at, x0, x1, x2, x3)
            else:
                _add_float(to, w0 + at, w1 + at, w2 + at, w3 + at, x0, x1, x2, x3)
        for i in range(vectors * _WIDTH, columns):
            at = i * item
            total = x0 * _load_at(kind, w0 + at) + x1 * _load_at(kind, w1 + at)
            total += x2 * _load_at(kind, w2 + at) + x3 * _load_at(kind, w3 + at)
            _store_float(acc + i * 4, _load_float(acc + i * 4) + total)


@njit(nogil=True, cache=True)
def _compact(x, size, threshold, rows, factors):
    """List the channels with abs(x) > threshold in `rows`, their values in `factors`."""
    count = 0
    for i in range(size):
        rows[count] = i
        factors[count] = x[i]
        count += abs(x[i]) > threshold
    return count


@njit(nogil=True, cache=True)
def share(size, thread, threads):
    """The part of `size` columns that a thread computes, in whole vectors."""
    vectors = (size + _WIDTH - 1) // _WIDTH
    start = vectors * thread // threads * _WIDTH
    stop = vectors * (thread + 1) // threads * _WIDTH
    return min(start, size), min(stop, size)


@njit(nogil=True, cache=True)
def project(kind, weight, inputs, outputs, x, offsets, thresholds, start, stop, y, lists, kept):
    """y[start:stop] += the projections of x, each with the channels above its own threshold.

    The columns are divided between the threads, not the rows: nothing has to be summed up
    afterwards, and the result does not depend on how many threads there are.

    Args:
        kind, weight, inputs, outputs: the matrix [inputs, outputs], by address.
        x: float32 [inputs].
        offsets: int64 [P + 1], column bounds of the P projections.
        thresholds: float32 [P].
        start, stop: the columns to compute.
        y: float32 [outputs], holding what is to be added to.
        lists: the thread's room for survivors, (int64 [inputs], float32 [inputs]).
        kept: int64 [P], raised by the number of survivors where `start` is 0.
    """
    rows, factors = lists
    item = 4 if kind == FLOAT else 2
    count = 0
    p = 0
    while p < len(thresholds):
        level = thresholds[p]
        q = p + 1  # neighbours with the same threshold are one matrix
        while q < len(thresholds) and thresholds[q] == level:
            q += 1
        first, last = max(start, offsets[p]), min(stop, offsets[q])
        if first < last or start == 0:
            count = _compact(x, inputs, level, rows, factors)
        if start == 0:
            for i in range(p, q):
                kept[i] += count
        if first < last:
            _add_rows(
                kind, weight + first * item, outputs * item, rows, factors, 0, count,
                y.ctypes.data + first * 4, last - first,
            )  # fmt: skip
        p = q


@njit(nogil=True, cache=True)
def wait(barrier, target):
    """Let every thread arrive: `barrier` is an address, `target` the arrivals to wait for."""
    _atomic_add(barrier)
    while _atomic_load(barrier) < target:
        _pause()


@njit(nogil=True, cache=True)
def project_share(
    thread, threads, kind, weight, inputs, outputs, x, offsets, thresholds, y, rows, factors, kept
):
    """One thread's share of a single projection."""
    start, stop = share(outputs, thread, threads)
    lists = (rows[thread], factors[thread])
    project(kind, weight, inputs, outputs, x, offsets, thresholds, start, stop, y, lists, kept)


@njit(nogil=True, cache=True)
def _norm(kind, weight, x, size, eps, out):
    """RMS norm of float32 x [size] with the weights at an address."""
    total = np.float32(0)
    for i in range(size):
        total += x[i] * x[i]
    scale = np.float32(1) / math.sqrt(total / size + eps)
    item = 4 if kind == FLOAT else 2
    for i in range(size):
        out[i] = x[i] * scale * _load_at(kind, weight + i * item)


@njit(nogil=True, cache=True)
def _rotate(head, cos, sin):
    """Rotary embedding of one head [head_dim] in place: halves paired as Hugging Face has them."""
    half = len(cos)
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cos[i] - b * sin[i]
        head[half + i] = b * cos[i] + a * sin[i]


@njit(nogil=True, cache=True)
def _attend(kind, q, keys, values, first, position, head_dim, scores, rows, out):
    """Attention of one query over the cached positions from `first` to `position`.

    `keys` and `values` are addresses of [length, head_dim]; float32 throughout, softmax by the
    running maximum's final value.
    """
    item = 4 if kind == FLOAT else 2
    count = position + 1 - first
    scale = np.float32(1 / math.sqrt(head_dim))
    top = np.float32(-np.inf)
    for i in range(count):
        row = keys + (first + i) * head_dim * item
        scores[i] = _dot(kind, row, q.ctypes.data, head_dim) * scale
        top = max(top, scores[i])
    total = np.float32(0)
    for i in range(count):
        scores[i] = math.exp(scores[i] - top)
        total += scores[i]
        rows[i] = first + i
    out[:] = 0
    stride = head_dim * item
    _add_rows(kind, values, stride, rows, scores, 0, count, out.ctypes.data, head_dim)
    for i in range(head_dim):
        out[i] /= total


@njit(nogil=True, cache=True)
def _attention(
    thread, threads, kind, layer, position, sizes, eps, norms, caches, window, tables, qkv, out,
    room,
):  # fmt: skip
    """One thread's heads: norm and rotate, write keys and values to the cache, attend.

    Threads that share a key-value head write the same bytes to the same place.
    """
    _, _, heads, kv_heads, head_dim, length = sizes
    keys, values = caches
    cos, sin = tables[0][position], tables[1][position]
    scores, rows, q, k = room
    item = 4 if kind == FLOAT else 2
    written = -1
    for head in range(heads * thread // threads, heads * (thread + 1) // threads):
        group = head // (heads // kv_heads)
        at = ((layer * kv_heads + group) * length) * head_dim * item
        if group != written:
            start = (heads + group) * head_dim
            k[:] = qkv[start : start + head_dim]
            if norms[1] != 0:
                _norm(kind, norms[1], k, head_dim, eps, k)
            _rotate(k, cos, sin)
            start += kv_heads * head_dim
            for i in range(head_dim):
                to = at + (position * head_dim + i) * item
                _store_at(kind, keys + to, k[i])
                _store_at(kind, values + to, qkv[start + i])
            written = group
        q[:] = qkv[head * head_dim : (head + 1) * head_dim]
        if norms[0] != 0:
            _norm(kind, norms[0], q, head_dim, eps, q)
        _rotate(q, cos, sin)
        first = 0 if window == 0 else max(0, position + 1 - window)
        head_out = out[head * head_dim : (head + 1) * head_dim]
        _attend(kind, q, keys + at, values + at, first, position, head_dim, scores, rows, head_out)


@njit(nogil=True, cache=True)
def _start_from(kind, bias, y, start, stop):
    """y[start:stop] = the bias at an address, or zeros where there is none."""
    item = 4 if kind == FLOAT else 2
    for i in range(start, stop):
        y[i] = np.float32(0) if bias == 0 else _load_at(kind, bias + i * item)


@njit(nogil=True, cache=True)
def _add_bias(kind, bias, y, start, stop):
    if bias != 0:
        item = 4 if kind == FLOAT else 2
        for i in range(start, stop):
            y[i] += _load_at(kind, bias + i * item)


@njit(nogil=True, cache=True)
def decode(
    thread, threads, token, position, kind, sizes, eps, weights, ends, caches, windows, tables,
    offsets, thresholds, kept, shared, private, barrier,
):  # fmt: skip
    """One token through the whole decoder, as one of `threads` threads that run this together.

    Args:
        thread, threads: this thread's number, and how many there are.
        token, position: the token's id and its place in the sequence.
        kind: dtype of all weights and of the cache.
        sizes: (hidden, intermediate, heads, key-value heads, head_dim, cache length).
        eps: of the RMS norms.
        weights: int64 [layers, 10], addresses; 0 is absent.
        ends: addresses of the embedding, the final norm and the lm_head, and the vocabulary's size.
        caches: addresses of keys and values, [layers, kv heads, length, head_dim].
        windows: int64 [layers], sliding windows; 0 is none.
        tables: cosines and sines, float32 [positions, head_dim / 2].
        offsets: column bounds of the projections in the qkv, o, gate-up and down matrices.
        thresholds: float32 [layers, 7].
        kept: int64 [layers, 7], raised by the survivors.
        shared: float32 (hidden, qkv, attention out, activated, gate-up, logits).
        private: this thread's (normed, rows, factors, scores, positions, q, k).
        barrier: address of an int64 that starts at 0.
    """
    hidden_size, intermediate, heads, kv_heads, head_dim, _ = sizes
    hidden, qkv, mixed, active, gate_up, logits = shared
    normed, rows, factors, scores, positions, q, k = private
    lists = (rows, factors)
    embedding, final_norm, lm_head, vocab = ends
    item = 4 if kind == FLOAT else 2
    q_size = heads * head_dim
    qkv_size = q_size + 2 * kv_heads * head_dim
    arrivals = 0

    low, high = share(hidden_size, thread, threads)
    for i in range(low, high):
        hidden[i] = _load_at(kind, embedding + (token * hidden_size + i) * item)
    arrivals += threads
    wait(barrier, arrivals)

    for layer in range(len(weights)):
        norm1, w_qkv, b_qkv, norm_q, norm_k, w_o, b_o, norm2, w_gate_up, w_down = (
            weights[layer, 0], weights[layer, 1], weights[layer, 2], weights[layer, 3],
            weights[layer, 4], weights[layer, 5], weights[layer, 6], weights[layer, 7],
            weights[layer, 8], weights[layer, 9],
        )  # fmt: skip
        levels, counts = thresholds[layer], kept[layer]

        _norm(kind, norm1, hidden, hidden_size, eps, normed)
        start, stop = share(qkv_size, thread, threads)
        _start_from(kind, b_qkv, qkv, start, stop)
        project(kind, w_qkv, hidden_size, qkv_size, normed, offsets[0], levels[0:3], start, stop,
                qkv, lists, counts[0:3])  # fmt: skip
        arrivals += threads
        wait(barrier, arrivals)

        _attention(thread, threads, kind, layer, position, sizes, eps, (norm_q, norm_k), caches,
                   windows[layer], tables, qkv, mixed, (scores, positions, q, k))  # fmt: skip
        arrivals += threads
        wait(barrier, arrivals)

        _add_bias(kind, b_o, hidden, low, high)
        project(kind, w_o, q_size, hidden_size, mixed, offsets[1], levels[3:4], low, high,
                hidden, lists, counts[3:4])  # fmt: skip
        arrivals += threads
        wait(barrier, arrivals)

        # A thread takes the same columns of gate and of up, so that it can multiply them itself.
        _norm(kind, norm2, hidden, hidden_size, eps, normed)
        start, stop = share(intermediate, thread, threads)
        for part in range(2):
            first, last = start + part * intermediate, stop + part * intermediate
            gate_up[first:last] = 0
            project(kind, w_gate_up, hidden_size, 2 * intermediate, normed, offsets[2],
                    levels[4:6], first, last, gate_up, lists, counts[4:6])  # fmt: skip
        for i in range(start, stop):
            gate = gate_up[i]
            active[i] = gate / (np.float32(1) + math.exp(-gate)) * gate_up[intermediate + i]
        arrivals += threads
        wait(barrier, arrivals)

        project(kind, w_down, intermediate, hidden_size, active, offsets[3], levels[6:7], low, high,
                hidden, lists, counts[6:7])  # fmt: skip
        arrivals += threads
        wait(barrier, arrivals)

    _norm(kind, final_norm, hidden, hidden_size, eps, normed)
    for i in range(vocab * thread // threads, vocab * (thread + 1) // threads):
        row = lm_head + i * hidden_size * item
        logits[i] = _dot(kind, row, normed.ctypes.data, hidden_size)
