# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""The compiled half of the CPU kernels: everything that numba turns into machine code.

Whatever is called from Python is cached on disk, the rest becomes part of it. Arrays are filled by
loops: for an assignment to a slice numba also compiles the text of the error that it might raise,
which takes as long as all of the rest.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
from numba import njit

from teal_kernels.cpu.code_cache import CodeCache
from teal_kernels.cpu.fragments import FRAGMENT, OPTIONS, compiled
from teal_kernels.cpu.intrinsics import (
    address_of,
    atomic_add,
    atomic_load,
    exp,
    futex,
    give_way,
    load,
    pause,
    store,
)
from teal_kernels.cpu.rows import add_bias, dots, fetch_bias, project_rows, weigh
from teal_kernels.cpu.structures import (
    DOWN_BIAS,
    GATE_UP_BIAS,
    INPUT_NORM,
    K_NORM,
    O_BIAS,
    POST_NORM,
    Q_NORM,
    QKV_BIAS,
)
from teal_kernels.cpu.team import ALL, WAIT, WAKE

# Turns that a thread spins for another before it sleeps: 30 to 100 us, more than threads of cores
# of their own are ever apart, and about what it takes to wake one. Where another process has the
# other's core, all of it is lost.
_SPINS = 2000


def _digest():
    """Of all sources in this folder."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _cached(function):
    """Compile on first use and keep the result on disk, where there is a place for it.

    numba renews its cache when this file changes, but not when those do that it imports. Under a
    name that contains the digest of all of them, nothing stale is found.
    """
    function.__qualname__ += f"_{_digest()}"
    dispatcher = njit(**OPTIONS)(function)
    with suppress(RuntimeError):  # neither the package's folder nor the user's cache takes files
        dispatcher._cache = CodeCache(function)
    return dispatcher


def cache_problem():
    """A sentence on why what was compiled is not kept on disk; None if it is."""
    caches = (function._cache for function in (decode, project))
    return next((cache.problem for cache in caches if getattr(cache, "problem", None)), None)


@compiled
def _wait(team):
    """Return when every thread of the team has come here."""
    team.phase[0] += team.threads
    everyone, sleepers = team.phase[0], team.barrier + 8
    if atomic_add(team.barrier, 1) + 1 == everyone:
        if team.syscall != 0 and atomic_add(sleepers, 0) > 0:
            futex(team.syscall, team.barrier, WAKE, ALL)
        return
    for _ in range(_SPINS):
        if atomic_load(team.barrier) >= everyone:
            return
        pause()
    # Who sleeps has counted itself before the kernel looks whether somebody came meanwhile.
    atomic_add(sleepers, 1)
    while True:
        arrived = atomic_load(team.barrier)
        if arrived >= everyone:
            break
        if team.syscall != 0:
            futex(team.syscall, team.barrier, WAIT, arrived)
        else:
            give_way(team.give_way)
    atomic_add(sleepers, -1)


@compiled
def _share(size, team):
    """What a thread computes of `size` equal things: (start, stop)."""
    return size * team.thread // team.threads, size * (team.thread + 1) // team.threads


@njit(**FRAGMENT, fastmath={"reassoc", "contract"})  # a sum of many lanes
def _norm(dtype, weight, x, eps, out):
    """RMS norm of float32 x with the weights at an address."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    scale = np.float32(1 / math.sqrt(total / len(x) + eps))
    for i in range(len(x)):
        out[i] = x[i] * scale * load(dtype, weight, i)


@compiled
def _rotate(head, cos, sin):
    """Rotary embedding of a head [head_dim] in place: halves paired as Hugging Face has them.

    cos and sin [pairs]: the channels beyond twice as many stay.
    """
    half = len(cos)
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cos[i] - b * sin[i]
        head[half + i] = b * cos[i] + a * sin[i]


@compiled
def _sum_parts(parts, start, out):
    """out = the sum of all threads' parts, from column `start` on."""
    for i in range(len(out)):
        total = parts[0, start + i]
        for thread in range(1, len(parts)):
            total += parts[thread, start + i]
        out[i] = total


@compiled
def _attend(model, scratch, keys, values, first, position, out):
    """Attention of scratch.query over the cached positions from `first` to `position`.

    `keys` and `values` are addresses of [length, head_dim].
    """
    row_bytes = address_of(model.dtype, 0, model.head_dim)
    keys, values = keys + first * row_bytes, values + first * row_bytes
    count, scores, scale = position + 1 - first, scratch.scores, model.query_scales[position]
    top = np.float32(-np.inf)
    query = scratch.query.ctypes.data
    dots(model.dtype, keys, row_bytes, query, model.head_dim, scores[:count])
    for i in range(count):
        scores[i] *= scale
        if scores[i] > top:
            top = scores[i]
    for i in range(count):
        scores[i] = exp(scores[i] - top)
    total = np.float32(0)
    for i in range(count):
        total += scores[i]
    weigh(model.dtype, values, row_bytes, scores, count, out)
    for i in range(model.head_dim):
        out[i] /= total


@compiled
def _write_cache(model, scratch, vectors, qkv, group, at, position, cos, sin):
    """Norm and rotate the key of one key-value head; cache it and its value at byte `at`."""
    size = model.head_dim
    start = (model.heads + group) * size
    _sum_parts(qkv, start, scratch.key)
    _sum_parts(qkv, start + model.kv_heads * size, scratch.value)
    if vectors[K_NORM] != 0:
        _norm(model.dtype, vectors[K_NORM], scratch.key, model.eps, scratch.key)
    _rotate(scratch.key, cos, sin)
    for i in range(size):
        store(model.dtype, model.keys + at, position * size + i, scratch.key[i])
        store(model.dtype, model.values + at, position * size + i, scratch.value[i])


@compiled
def _attention(model, scratch, vectors, layer, position, qkv, low, high):
    """The heads of channels `low` to `high` into scratch.inputs: norm, rotate, cache, attend.

    Threads that share a head compute all of it; those that share a key-value head write the same
    bytes to the same place.
    """
    size, window = model.head_dim, model.windows[layer]
    first = 0 if window == 0 else max(0, position + 1 - window)
    head_bytes = address_of(model.dtype, 0, model.length * size)
    pairs = model.pairs[layer]
    cos, sin = model.cos[position, :pairs], model.sin[position, :pairs]
    written = -1
    for head in range(low // size, (high + size - 1) // size):
        group = head // (model.heads // model.kv_heads)
        at = (layer * model.kv_heads + group) * head_bytes
        if group != written:
            _write_cache(model, scratch, vectors, qkv, group, at, position, cos, sin)
            written = group
        _sum_parts(qkv, head * size, scratch.query)
        if vectors[Q_NORM] != 0:
            _norm(model.dtype, vectors[Q_NORM], scratch.query, model.eps, scratch.query)
        _rotate(scratch.query, cos, sin)
        out = scratch.inputs[head * size : (head + 1) * size]
        _attend(model, scratch, model.keys + at, model.values + at, first, position, out)


@compiled
def _add_parts(team, model, shared, scratch):
    """hidden += the sum of all threads' parts of o or down, once they are there."""
    _wait(team)
    for thread in range(team.threads):
        for i in range(len(scratch.hidden)):
            scratch.hidden[i] += model.residual_multiplier * shared.narrow[thread, i]


@compiled
def _attention_block(team, model, shared, scratch, layer, position, thresholds, kept):
    """hidden += o(attention(qkv(norm(hidden)))).

    A thread that has computed some heads goes on to the rows of o that they feed.
    """
    vectors, me = model.vectors[layer], team.thread
    mates, alone = (me, team.threads), (0, 1)
    qkv = shared.wide[:, : (model.heads + 2 * model.kv_heads) * model.head_dim]
    fetch_bias(vectors[QKV_BIAS], *_share(qkv.shape[1], team))
    fetch_bias(vectors[O_BIAS], *_share(model.hidden, team))
    _norm(np.float32, vectors[INPUT_NORM], scratch.hidden, model.eps, scratch.normed)
    project_rows(model.qkv, layer, scratch.normed, 0, model.hidden, thresholds[0:3], qkv[me],
                 scratch, kept[0:3], mates)  # fmt: skip
    add_bias(vectors[QKV_BIAS], qkv[me], *_share(len(qkv[me]), team))
    _wait(team)
    low, high = _share(model.heads * model.head_dim, team)
    _attention(model, scratch, vectors, layer, position, qkv, low, high)
    project_rows(model.o, layer, scratch.inputs, low, high, thresholds[3:4], shared.narrow[me],
                 scratch, kept[3:4], alone)  # fmt: skip
    add_bias(vectors[O_BIAS], shared.narrow[me], *_share(len(shared.narrow[me]), team))
    _add_parts(team, model, shared, scratch)


@compiled
def _activate(gate_up, me, start, stop, out):
    """out[start:stop] = SiLU(gate) * up, both summed up over all threads' parts."""
    gate, up = gate_up[me, start:stop], gate_up[me, len(out) + start : len(out) + stop]
    mine = out[start:stop]
    for thread in range(len(gate_up)):
        if thread != me:  # what no other thread reads is summed up in the thread's own part
            for i in range(len(mine)):
                gate[i] += gate_up[thread, start + i]
                up[i] += gate_up[thread, len(out) + start + i]
    for i in range(len(mine)):
        mine[i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i]


@compiled
def _mlp_block(team, model, shared, scratch, layer, thresholds, kept):
    """hidden += down(silu(gate(norm(hidden))) * up(norm(hidden)))."""
    me, mates, alone = team.thread, (team.thread, team.threads), (0, 1)
    vectors = model.vectors[layer]
    gate_up, inner = shared.wide[:, : 2 * model.inner], scratch.inputs[: model.inner]
    fetch_bias(vectors[GATE_UP_BIAS], *_share(2 * model.inner, team))
    fetch_bias(vectors[DOWN_BIAS], *_share(model.hidden, team))
    _norm(np.float32, vectors[POST_NORM], scratch.hidden, model.eps, scratch.normed)
    project_rows(model.gate_up, layer, scratch.normed, 0, model.hidden, thresholds[4:6],
                 gate_up[me], scratch, kept[4:6], mates)  # fmt: skip
    add_bias(vectors[GATE_UP_BIAS], gate_up[me], *_share(len(gate_up[me]), team))
    _wait(team)
    low, high = _share(model.inner, team)
    _activate(gate_up, me, low, high, inner)
    project_rows(model.down, layer, inner, low, high, thresholds[6:7], shared.narrow[me], scratch,
                 kept[6:7], alone)  # fmt: skip
    add_bias(vectors[DOWN_BIAS], shared.narrow[me], *_share(len(shared.narrow[me]), team))
    _add_parts(team, model, shared, scratch)


@compiled
def _logits(team, model, normed, logits, room):
    """The thread's share of logits [vocab]: the lm_head's rows times `normed`.

    room: address, as `dots` has it.
    """
    row_bytes = address_of(model.lm_head_dtype, 0, model.hidden)
    start, stop = _share(model.vocab, team)
    rows, x = model.lm_head + start * row_bytes, normed.ctypes.data
    dots(model.lm_head_dtype, rows, row_bytes, x, model.hidden, logits[start:stop], room)
    if model.logits_multiplier != 1:
        for i in range(start, stop):
            logits[i] *= model.logits_multiplier
    if model.lm_head_scales != 0:
        for i in range(start, stop):
            logits[i] *= load(np.float32, model.lm_head_scales, i)


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
    row = model.embed_tokens + address_of(model.dtype, 0, token * model.hidden)
    for i in range(model.hidden):
        scratch.hidden[i] = load(model.dtype, row, i) * model.embedding_multiplier
    for layer in range(len(model.vectors)):
        levels, counts = thresholds[layer], kept[layer]
        _attention_block(team, model, shared, scratch, layer, position, levels, counts)
        _mlp_block(team, model, shared, scratch, layer, levels, counts)
    _norm(np.float32, model.norm, scratch.hidden, model.eps, scratch.normed)
    _logits(team, model, scratch.normed, shared.logits, scratch.lines.ctypes.data)


@_cached
def project(team, matrix, layer, x, thresholds, parts, y, scratch, kept):
    """One thread's share of a single matrix: y [M, N] = what all threads' parts of x sum up to."""
    for row in range(len(x)):
        project_rows(matrix, layer, x[row], 0, x.shape[1], thresholds, parts[team.thread],
                     scratch, kept, (team.thread, team.threads))  # fmt: skip
        _wait(team)
        start, stop = _share(y.shape[1], team)
        for i in range(start, stop):
            y[row, i] = 0
            for thread in range(team.threads):
                y[row, i] += parts[thread, i]
        _wait(team)  # the next row's parts go to the same place
