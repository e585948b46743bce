# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""The compiled half of the CPU kernels: everything that numba turns into machine code.

One file on purpose: numba's cache on disk is renewed when the file of a cached function changes,
but not when a function that it calls changes elsewhere. Whatever is called from Python is cached,
the rest becomes part of it. Arrays are filled by loops: for an assignment to a slice numba also
compiles the text of the error that it might raise, which takes as long as all of the rest.

Row-skipping follows TEAL (arXiv 2408.14690, section 4.4), in the form that suits a CPU: one
thread walks the surviving rows of its own columns, four rows at a time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from teal_kernels.cpu.intrinsics import (
    WIDTH,
    add_four_rows,
    atomic_add,
    atomic_load,
    dot_vectors,
    give_way,
    item_bytes,
    load,
    pause,
    prefetch,
    store,
)

# Turns that a thread spins for another before it lets the system run something else: some 20 us,
# more than threads of their own cores are ever apart.
_SPINS = 1000


class Team(NamedTuple):
    """One of the threads that run a function together, and how it meets the others."""

    thread: int
    threads: int
    barrier: int  # address of an int64, 0 at the start: arrivals so far
    phase: Any  # int64 [1] of this thread, 0 at the start: arrivals that end its last wait
    give_way: int  # address of the C function that yields the core, or 0


class Model(NamedTuple):
    """A decoder. Weights are addresses of contiguous tensors of one dtype; 0 is an absent one."""

    dtype: Any  # of the weights and the cache: HALF, BFLOAT or FLOAT
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    length: int  # positions in the cache
    eps: Any  # float32
    layers: Any  # int64 [layers, 10], addresses in the order of step.LAYER_WEIGHTS
    windows: Any  # int64 [layers], sliding windows; 0 is none
    offsets: Any  # int64 column bounds of the projections in qkv, o, gate_up and down
    embed_tokens: int  # [vocab, hidden]
    norm: int
    lm_head: int  # [vocab, hidden]
    keys: int  # [layers, kv_heads, length, head_dim]
    values: int
    cos: Any  # float32 [positions, head_dim / 2]
    sin: Any


class Activations(NamedTuple):
    """What the threads share while they decode a token, all float32."""

    hidden: Any
    qkv: Any
    mixed: Any  # attention's output
    gate_up: Any
    active: Any  # SiLU(gate) * up
    logits: Any


class Scratch(NamedTuple):
    """What one thread writes to."""

    normed: Any  # float32 [hidden]
    rows: Any  # int64 [longest input], surviving channels
    factors: Any  # float32 [longest input], their values
    scores: Any  # float32 [length]
    positions: Any  # int64 [length], 0, 1, 2 ...
    query: Any  # float32 [head_dim]
    key: Any


def _cached(function):
    """Compile on first use and keep the result on disk, where there is a place for it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        return njit(nogil=True)(function)


@njit(nogil=True)
def _wait(team):
    """Return when every thread of the team has come here."""
    team.phase[0] += team.threads
    atomic_add(team.barrier)
    spins = 0
    while atomic_load(team.barrier) < team.phase[0]:
        spins += 1
        if spins % _SPINS:
            pause()
        else:
            give_way(team.give_way)


@njit(nogil=True)
def _share(size, team):
    """The columns of `size` that a thread computes, in whole vectors: (start, stop)."""
    vectors = (size + WIDTH - 1) // WIDTH
    start = vectors * team.thread // team.threads * WIDTH
    stop = vectors * (team.thread + 1) // team.threads * WIDTH
    return min(start, size), min(stop, size)


@njit(nogil=True)
def _dot(dtype, row, x, size):
    """The product of a row of weights and a float32 vector, both addresses."""
    vectors = size // WIDTH
    item = item_bytes(dtype)
    total = dot_vectors(dtype, row, x, vectors)
    for i in range(vectors * WIDTH, size):
        total += load(dtype, row + i * item) * load(np.float32, x + i * 4)
    return total


@njit(nogil=True)
def _add_rows(dtype, base, stride, rows, factors, count, to, columns):
    """Add the sum of factors[r] * row r over the first `count` rows to `columns` float32 at `to`.

    A row is `columns` values at base + rows[r] * stride bytes. While four rows are added, the
    next four are fetched: no hardware prefetcher can guess which rows survive.
    """
    item = item_bytes(dtype)
    vectors = columns // WIDTH
    last = count - 1
    for r in range(0, count, 4):
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
            at = v * WIDTH * item
            prefetch(n0 + at)
            prefetch(n1 + at)
            prefetch(n2 + at)
            prefetch(n3 + at)
            add_four_rows(
                dtype, to + v * WIDTH * 4, w0 + at, w1 + at, w2 + at, w3 + at, x0, x1, x2, x3
            )
        for i in range(vectors * WIDTH, columns):
            at = i * item
            total = x0 * load(dtype, w0 + at) + x1 * load(dtype, w1 + at)
            total += x2 * load(dtype, w2 + at) + x3 * load(dtype, w3 + at)
            store(np.float32, to + i * 4, load(np.float32, to + i * 4) + total)


@njit(nogil=True)
def _compact(x, threshold, rows, factors):
    """List the channels with abs(x) > threshold in `rows`, their values in `factors`."""
    count = 0
    for i in range(len(x)):
        rows[count] = i
        factors[count] = x[i]
        count += abs(x[i]) > threshold
    return count


@njit(nogil=True)
def _project(dtype, weight, x, offsets, thresholds, start, stop, y, scratch, kept):
    """y[start:stop] += the projections of x, each of the channels above its own threshold.

    The columns are divided between the threads, not the rows: nothing has to be summed up
    afterwards, and the result does not depend on how many threads there are.

    Args:
        dtype, weight: the matrix [len(x), len(y)], by address.
        x: float32.
        offsets: int64 [P + 1], column bounds of the P projections.
        thresholds: float32 [P].
        start, stop: the columns to compute.
        y: float32, holding what is to be added to.
        scratch: has room for the survivors.
        kept: int64 [P], raised by the survivors, by whoever computes column 0.
    """
    item = item_bytes(dtype)
    counts = start == 0 and stop > 0
    p = 0
    while p < len(thresholds):
        q = p + 1  # neighbours with the same threshold are one matrix
        while q < len(thresholds) and thresholds[q] == thresholds[p]:
            q += 1
        first, last = max(start, offsets[p]), min(stop, offsets[q])
        if first < last or counts:
            count = _compact(x, thresholds[p], scratch.rows, scratch.factors)
            if counts:
                for i in range(p, q):
                    kept[i] += count
            if first < last:
                _add_rows(
                    dtype, weight + first * item, len(y) * item, scratch.rows, scratch.factors,
                    count, y.ctypes.data + first * 4, last - first,
                )  # fmt: skip
        p = q


@njit(nogil=True)
def _norm(dtype, weight, x, eps, out):
    """RMS norm of float32 x with the weights at an address."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    scale = np.float32(1 / math.sqrt(total / len(x) + eps))
    item = item_bytes(dtype)
    for i in range(len(x)):
        out[i] = x[i] * scale * load(dtype, weight + i * item)


@njit(nogil=True)
def _rotate(head, cos, sin):
    """Rotary embedding of one head [head_dim] in place: halves paired as Hugging Face has them."""
    half = len(cos)
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cos[i] - b * sin[i]
        head[half + i] = b * cos[i] + a * sin[i]


@njit(nogil=True)
def _start_from(dtype, bias, y, start, stop):
    """y[start:stop] = the bias at an address, or zeros where there is none."""
    item = item_bytes(dtype)
    for i in range(start, stop):
        y[i] = np.float32(0) if bias == 0 else load(dtype, bias + i * item)


@njit(nogil=True)
def _attend(model, scratch, keys, values, first, position, out):
    """Attention of scratch.query over the cached positions from `first` to `position`.

    `keys` and `values` are addresses of [length, head_dim].
    """
    row_bytes = model.head_dim * item_bytes(model.dtype)
    keys, values = keys + first * row_bytes, values + first * row_bytes
    count, scores = position + 1 - first, scratch.scores
    scale = np.float32(1 / math.sqrt(model.head_dim))
    top = np.float32(-np.inf)
    for i in range(count):
        row = keys + i * row_bytes
        scores[i] = _dot(model.dtype, row, scratch.query.ctypes.data, model.head_dim) * scale
        top = max(top, scores[i])
    total = np.float32(0)
    for i in range(count):
        scores[i] = math.exp(scores[i] - top)
        total += scores[i]
    _start_from(model.dtype, 0, out, 0, model.head_dim)
    _add_rows(
        model.dtype, values, row_bytes, scratch.positions, scores, count, out.ctypes.data,
        model.head_dim,
    )  # fmt: skip
    for i in range(model.head_dim):
        out[i] /= total


@njit(nogil=True)
def _write_cache(model, scratch, weights, qkv, group, at, position):
    """Norm and rotate the key of one key-value head; cache it and its value at byte `at`."""
    size, item = model.head_dim, item_bytes(model.dtype)
    start = (model.heads + group) * size
    for i in range(size):
        scratch.key[i] = qkv[start + i]
    if weights[4] != 0:
        _norm(model.dtype, weights[4], scratch.key, model.eps, scratch.key)
    _rotate(scratch.key, model.cos[position], model.sin[position])
    start += model.kv_heads * size
    for i in range(size):
        to = at + (position * size + i) * item
        store(model.dtype, model.keys + to, scratch.key[i])
        store(model.dtype, model.values + to, qkv[start + i])


@njit(nogil=True)
def _attention(team, model, scratch, weights, layer, position, qkv, out):
    """One thread's heads: norm and rotate, write keys and values to the cache, attend.

    Threads that share a key-value head write the same bytes to the same place.
    """
    size, window = model.head_dim, model.windows[layer]
    first = 0 if window == 0 else max(0, position + 1 - window)
    head_bytes = model.length * size * item_bytes(model.dtype)
    written = -1
    heads = range(
        model.heads * team.thread // team.threads, model.heads * (team.thread + 1) // team.threads
    )
    for head in heads:
        group = head // (model.heads // model.kv_heads)
        at = (layer * model.kv_heads + group) * head_bytes
        if group != written:
            _write_cache(model, scratch, weights, qkv, group, at, position)
            written = group
        for i in range(size):
            scratch.query[i] = qkv[head * size + i]
        if weights[3] != 0:
            _norm(model.dtype, weights[3], scratch.query, model.eps, scratch.query)
        _rotate(scratch.query, model.cos[position], model.sin[position])
        head_out = out[head * size : (head + 1) * size]
        _attend(model, scratch, model.keys + at, model.values + at, first, position, head_out)


@njit(nogil=True)
def _attention_block(team, model, acts, scratch, layer, position, thresholds, kept):
    """hidden += o(attention(qkv(norm(hidden))))."""
    dtype, weights = model.dtype, model.layers[layer]
    _norm(dtype, weights[0], acts.hidden, model.eps, scratch.normed)
    start, stop = _share(len(acts.qkv), team)
    _start_from(dtype, weights[2], acts.qkv, start, stop)
    _project(dtype, weights[1], scratch.normed, model.offsets[0], thresholds[0:3], start, stop,
             acts.qkv, scratch, kept[0:3])  # fmt: skip
    _wait(team)
    _attention(team, model, scratch, weights, layer, position, acts.qkv, acts.mixed)
    _wait(team)
    start, stop = _share(model.hidden, team)
    if weights[6] != 0:
        for i in range(start, stop):
            acts.hidden[i] += load(dtype, weights[6] + i * item_bytes(dtype))
    _project(dtype, weights[5], acts.mixed, model.offsets[1], thresholds[3:4], start, stop,
             acts.hidden, scratch, kept[3:4])  # fmt: skip
    _wait(team)


@njit(nogil=True)
def _mlp_block(team, model, acts, scratch, layer, thresholds, kept):
    """hidden += down(silu(gate(norm(hidden))) * up(norm(hidden)))."""
    dtype, weights = model.dtype, model.layers[layer]
    _norm(dtype, weights[7], acts.hidden, model.eps, scratch.normed)
    # A thread takes the same columns of gate and of up, so that it can multiply them itself.
    start, stop = _share(model.inner, team)
    for part in range(2):
        first, last = start + part * model.inner, stop + part * model.inner
        _start_from(dtype, 0, acts.gate_up, first, last)
        _project(dtype, weights[8], scratch.normed, model.offsets[2], thresholds[4:6], first, last,
                 acts.gate_up, scratch, kept[4:6])  # fmt: skip
    for i in range(start, stop):
        gate = acts.gate_up[i]
        silu = gate / (np.float32(1) + math.exp(-gate))
        acts.active[i] = silu * acts.gate_up[model.inner + i]
    _wait(team)
    start, stop = _share(model.hidden, team)
    _project(dtype, weights[9], acts.active, model.offsets[3], thresholds[6:7], start, stop,
             acts.hidden, scratch, kept[6:7])  # fmt: skip
    _wait(team)


@_cached
def decode(team, model, acts, scratch, token, position, thresholds, kept):
    """Take one token through the whole decoder, together with the other threads of the team.

    Args:
        team: this thread's.
        model: the weights, and the cache, which gains the token's keys and values.
        acts: shared by the threads; its logits are the result.
        scratch: this thread's.
        token, position: the token's id and its place in the sequence.
        thresholds: float32 [layers, 7].
        kept: int64 [layers, 7], raised by the survivors.
    """
    start, stop = _share(model.hidden, team)
    row = model.embed_tokens + token * model.hidden * item_bytes(model.dtype)
    _start_from(model.dtype, row, acts.hidden, start, stop)
    _wait(team)
    for layer in range(len(model.layers)):
        levels, counts = thresholds[layer], kept[layer]
        _attention_block(team, model, acts, scratch, layer, position, levels, counts)
        _mlp_block(team, model, acts, scratch, layer, levels, counts)
    _norm(model.dtype, model.norm, acts.hidden, model.eps, scratch.normed)
    start, stop = _share(model.vocab, team)
    for i in range(start, stop):
        row = model.lm_head + i * model.hidden * item_bytes(model.dtype)
        acts.logits[i] = _dot(model.dtype, row, scratch.normed.ctypes.data, model.hidden)


@_cached
def project(team, dtype, weight, x, offsets, thresholds, y, scratch, kept):
    """One thread's share of a single projection, as `_project` has it."""
    start, stop = _share(len(y), team)
    _project(dtype, weight, x, offsets, thresholds, start, stop, y, scratch, kept)
