# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""The compiled half of the CPU kernels: everything that numba turns into machine code.

numba's cache on disk is renewed when this file changes, but not when `intrinsics` or `structures`
do: touch this one after editing them. Whatever is called from Python is cached, the rest becomes
part of it. Arrays are filled by loops: for an assignment to a slice numba also
compiles the text of the error that it might raise, which takes as long as all of the rest.

Row-skipping follows TEAL (arXiv 2408.14690, section 4.4), in the form that suits a CPU: one
thread walks its part of the surviving rows, four rows at a time.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from teal_kernels.cpu.intrinsics import (
    WIDTH,
    add_four_rows,
    atomic_add,
    atomic_load,
    borrow,
    dot_vectors,
    exp,
    give_way,
    item_bytes,
    load,
    pause,
    prefetch,
    store,
    weigh_rows,
)

# Turns that a thread spins for another before it lets the system run something else: some 20 us,
# more than threads of their own cores are ever apart.
_SPINS = 1000


# Division as in numpy: Python's, which raises, would keep loops from being vectorised.
_compiled = njit(nogil=True, error_model="numpy")


def _cached(function):
    """Compile on first use and keep the result on disk, where there is a place for it."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        return _compiled(function)


@_compiled
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


@_compiled
def _share(size, team):
    """What a thread computes of `size` equal things: (start, stop)."""
    return size * team.thread // team.threads, size * (team.thread + 1) // team.threads


@_compiled
def _dot(dtype, row, x, size):
    """The product of a row of weights and a float32 vector, both addresses."""
    vectors = size // WIDTH
    item = item_bytes(dtype)
    total = dot_vectors(dtype, row, x, vectors)
    for i in range(vectors * WIDTH, size):
        total += load(dtype, row + i * item) * load(np.float32, x + i * 4)
    return total


@_compiled
def _add_rows(dtype, base, stride, rows, factors, low, high, to, columns):
    """Add the sum of factors[r] * row r, r from `low` to `high`, to `columns` float32 at `to`.

    A row is `columns` values at base + rows[r] * stride bytes. While four rows are added, the
    next four are fetched: no hardware prefetcher can guess which rows survive.
    """
    item = item_bytes(dtype)
    vectors = columns // WIDTH
    last = high - 1
    for r in range(low, high, 4):
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


@_compiled
def _compact(x, start, stop, threshold, rows, factors):
    """List the channels of x[start:stop] with abs(x) > threshold, their values in `factors`."""
    count = 0
    for i in range(start, stop):
        rows[count] = i
        factors[count] = x[i]
        count += abs(x[i]) > threshold
    return count


@_compiled
def _project_rows(dtype, weight, x, start, stop, offsets, thresholds, part, scratch, kept, team):
    """Add a thread's part of the projections of x to `part`, float32 [columns].

    Each projection takes the channels of x[start:stop] above its own threshold, and a thread an
    equal share of those.

    The rows are divided between the threads, not the columns, although the parts then have to be
    summed up: a thread that reads whole rows gets 6 to 16 % more out of the memory (Zen 3).

    Args:
        dtype, weight: the matrix [channels, columns], by address.
        offsets: int64 [P + 1], column bounds of the P projections.
        thresholds: float32 [P].
        scratch: has room for the survivors.
        kept: int64 [P], raised by the survivors.
        team: (thread, threads); (0, 1) for all that survive.
    """
    item, (thread, threads) = item_bytes(dtype), team
    stride = len(part) * item
    p = 0
    while p < len(thresholds):
        q = p + 1  # neighbours with the same threshold are one matrix
        while q < len(thresholds) and thresholds[q] == thresholds[p]:
            q += 1
        count = _compact(x, start, stop, thresholds[p], scratch.rows, scratch.factors)
        for i in range(p, q):
            kept[i] += count
        low, high = count * thread // threads, count * (thread + 1) // threads
        first, columns = offsets[p], offsets[q] - offsets[p]
        _add_rows(
            dtype, weight + first * item, stride, scratch.rows, scratch.factors, low, high,
            part.ctypes.data + first * 4, columns,
        )  # fmt: skip
        p = q


@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})  # a sum of many lanes
def _norm(dtype, weight, x, eps, out):
    """RMS norm of float32 x with the weights at an address."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    scale = np.float32(1 / math.sqrt(total / len(x) + eps))
    item = item_bytes(dtype)
    for i in range(len(x)):
        out[i] = x[i] * scale * load(dtype, weight + i * item)


@_compiled
def _rotate(head, cos, sin):
    """Rotary embedding of one head [head_dim] in place: halves paired as Hugging Face has them."""
    half = len(cos)
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cos[i] - b * sin[i]
        head[half + i] = b * cos[i] + a * sin[i]


@_compiled
def _start_from(dtype, bias, part):
    """part = the bias at an address, or zeros where there is none."""
    item = item_bytes(dtype)
    for i in range(len(part)):
        part[i] = np.float32(0) if bias == 0 else load(dtype, bias + i * item)


@_compiled
def _sum_parts(parts, start, out):
    """out = the sum of all threads' parts, from column `start` on."""
    for i in range(len(out)):
        total = parts[0, start + i]
        for thread in range(1, len(parts)):
            total += parts[thread, start + i]
        out[i] = total


@_compiled
def _weigh(dtype, base, stride, factors, count, out):
    """out = the sum of factors[i] times row i of `count` rows, which are `stride` bytes apart."""
    item, vectors = item_bytes(dtype), len(out) // WIDTH
    for v in range(vectors):
        at, to = base + v * WIDTH * item, out.ctypes.data + v * WIDTH * 4
        weigh_rows(dtype, to, at, stride, factors.ctypes.data, count)
    for column in range(vectors * WIDTH, len(out)):
        total = np.float32(0)
        for i in range(count):
            total += factors[i] * load(dtype, base + i * stride + column * item)
        out[column] = total


@_compiled
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
    for i in range(count):
        if scores[i] > top:
            top = scores[i]
    for i in range(count):
        scores[i] = exp(scores[i] - top)
    total = np.float32(0)
    for i in range(count):
        total += scores[i]
    _weigh(model.dtype, values, row_bytes, scores, count, out)
    for i in range(model.head_dim):
        out[i] /= total


@_compiled
def _write_cache(model, scratch, weights, qkv, group, at, position):
    """Norm and rotate the key of one key-value head; cache it and its value at byte `at`."""
    size, item = model.head_dim, item_bytes(model.dtype)
    start = (model.heads + group) * size
    _sum_parts(qkv, start, scratch.key)
    _sum_parts(qkv, start + model.kv_heads * size, scratch.value)
    if weights[4] != 0:
        _norm(model.dtype, weights[4], scratch.key, model.eps, scratch.key)
    _rotate(scratch.key, model.cos[position], model.sin[position])
    for i in range(size):
        to = at + (position * size + i) * item
        store(model.dtype, model.keys + to, scratch.key[i])
        store(model.dtype, model.values + to, scratch.value[i])


@_compiled
def _attention(model, scratch, weights, layer, position, qkv, low, high):
    """Heads `low` to `high` into scratch.inputs: norm, rotate, write to the cache, attend.

    Threads that share a key-value head write the same bytes to the same place.
    """
    size, window = model.head_dim, model.windows[layer]
    first = 0 if window == 0 else max(0, position + 1 - window)
    head_bytes = model.length * size * item_bytes(model.dtype)
    written = -1
    for head in range(low, high):
        group = head // (model.heads // model.kv_heads)
        at = (layer * model.kv_heads + group) * head_bytes
        if group != written:
            _write_cache(model, scratch, weights, qkv, group, at, position)
            written = group
        _sum_parts(qkv, head * size, scratch.query)
        if weights[3] != 0:
            _norm(model.dtype, weights[3], scratch.query, model.eps, scratch.query)
        _rotate(scratch.query, model.cos[position], model.sin[position])
        out = scratch.inputs[head * size : (head + 1) * size]
        _attend(model, scratch, model.keys + at, model.values + at, first, position, out)


@_compiled
def _add_parts(team, shared, scratch):
    """hidden += the sum of all threads' parts of o or down, once they are there."""
    _wait(team)
    for thread in range(team.threads):
        for i in range(len(scratch.hidden)):
            scratch.hidden[i] += shared.narrow[thread, i]


@_compiled
def _attention_block(team, model, shared, scratch, layer, position, thresholds, kept):
    """hidden += o(attention(qkv(norm(hidden)))).

    A thread that has computed some heads goes on to the rows of o that they feed.
    """
    dtype, weights, me = model.dtype, model.layers[layer], team.thread
    mates, alone = (me, team.threads), (0, 1)
    qkv = shared.wide[:, : (model.heads + 2 * model.kv_heads) * model.head_dim]
    _norm(dtype, weights[0], scratch.hidden, model.eps, scratch.normed)
    _start_from(dtype, weights[2] if me == 0 else 0, qkv[me])
    _project_rows(dtype, weights[1], scratch.normed, 0, model.hidden, model.offsets[0],
                  thresholds[0:3], qkv[me], scratch, kept[0:3], mates)  # fmt: skip
    _wait(team)
    low, high = _share(model.heads, team)
    _attention(model, scratch, weights, layer, position, qkv, low, high)
    _start_from(dtype, weights[6] if me == 0 else 0, shared.narrow[me])
    _project_rows(dtype, weights[5], scratch.inputs, low * model.head_dim, high * model.head_dim,
                  model.offsets[1], thresholds[3:4], shared.narrow[me], scratch, kept[3:4],
                  alone)  # fmt: skip
    _add_parts(team, shared, scratch)


@_compiled
def _activate(gate_up, start, stop, out):
    """out[start:stop] = SiLU(gate) * up, both summed up over all threads' parts."""
    gate = gate_up[0, start:stop]  # no other thread reads these columns of it
    up = gate_up[0, len(out) + start : len(out) + stop]
    mine = out[start:stop]
    for thread in range(1, len(gate_up)):
        for i in range(len(mine)):
            gate[i] += gate_up[thread, start + i]
            up[i] += gate_up[thread, len(out) + start + i]
    for i in range(len(mine)):
        mine[i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i]


@_compiled
def _mlp_block(team, model, shared, scratch, layer, thresholds, kept):
    """hidden += down(silu(gate(norm(hidden))) * up(norm(hidden)))."""
    dtype, weights, me = model.dtype, model.layers[layer], team.thread
    mates, alone = (me, team.threads), (0, 1)
    gate_up, inner = shared.wide[:, : 2 * model.inner], scratch.inputs[: model.inner]
    _norm(dtype, weights[7], scratch.hidden, model.eps, scratch.normed)
    _start_from(dtype, 0, gate_up[me])
    _project_rows(dtype, weights[8], scratch.normed, 0, model.hidden, model.offsets[2],
                  thresholds[4:6], gate_up[me], scratch, kept[4:6], mates)  # fmt: skip
    _wait(team)
    low, high = _share(model.inner, team)
    _activate(gate_up, low, high, inner)
    _start_from(dtype, 0, shared.narrow[me])
    _project_rows(dtype, weights[9], inner, low, high, model.offsets[3], thresholds[6:7],
                  shared.narrow[me], scratch, kept[6:7], alone)  # fmt: skip
    _add_parts(team, shared, scratch)


@_cached
def decode(team, model, shared, scratch, token, position, thresholds, kept):
    """Take one token through the whole decoder, together with the other threads of the team.

    Args:
        team: this thread's.
        model: the weights, and the cache, which gains the token's keys and values.
        shared: the threads'; its logits are the result.
        scratch: this thread's.
        token, position: the token's id and its place in the sequence.
        thresholds: float32 [layers, 7].
        kept: int64 [layers, 7] of this thread, raised by the survivors that it listed: all of
            qkv's and gate_up's, those of its own channels of o's and down's.
    """
    team, model, shared, scratch = borrow(team), borrow(model), borrow(shared), borrow(scratch)
    thresholds, kept = borrow(thresholds), borrow(kept)
    row_bytes = model.hidden * item_bytes(model.dtype)
    _start_from(model.dtype, model.embed_tokens + token * row_bytes, scratch.hidden)
    for layer in range(len(model.layers)):
        levels, counts = thresholds[layer], kept[layer]
        _attention_block(team, model, shared, scratch, layer, position, levels, counts)
        _mlp_block(team, model, shared, scratch, layer, levels, counts)
    _norm(model.dtype, model.norm, scratch.hidden, model.eps, scratch.normed)
    start, stop = _share(model.vocab, team)
    for i in range(start, stop):
        row = model.lm_head + i * row_bytes
        for line in range(2 * row_bytes, 3 * row_bytes, 64):  # two rows ahead is 5 % faster
            prefetch(row + line)
        shared.logits[i] = _dot(model.dtype, row, scratch.normed.ctypes.data, model.hidden)


@_cached
def project(team, dtype, weight, x, offsets, thresholds, parts, y, scratch, kept):
    """One thread's share of a single projection: y += what all threads' parts sum up to."""
    mine = parts[team.thread]
    _start_from(dtype, 0, mine)
    _project_rows(dtype, weight, x, 0, len(x), offsets, thresholds, mine, scratch, kept,
                  (team.thread, team.threads))  # fmt: skip
    _wait(team)
    start, stop = _share(len(y), team)
    for thread in range(team.threads):
        for i in range(start, stop):
            y[i] += parts[thread, i]
