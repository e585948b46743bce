# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""Several tokens through the decoder at once, dense: prompts, and drafts that are verified.

The threads share tokens, columns or heads, and meet after each part of a layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from teal_kernels.cpu.amx import configure, restore
from teal_kernels.cpu.attention import QUERIES, attend_block
from teal_kernels.cpu.compiled import _cached, _norm, _rotate, _share, _wait
from teal_kernels.cpu.intrinsics import address_of, borrow, exp, load, store
from teal_kernels.cpu.product import WIDTH, multiply, put
from teal_kernels.cpu.rows import add_bias, compiled, dots
from teal_kernels.cpu.structures import (
    INPUT_NORM,
    K_NORM,
    O_BIAS,
    POST_NORM,
    Q_NORM,
    QKV_BIAS,
)

# Tokens that go through a layer together. Weights are turned to floats once for all of them.
CHUNK = 256
# Rows of the lm_head that stay in the cache for all tokens.
_ROWS = 64


class Tokens(NamedTuple):
    """What the threads hand to each other, a row for each of CHUNK tokens."""

    inputs: Any  # of qkv, o and gate_up, as `product` has them, in whole tiles
    inner: Any  # the same for down
    qkv: Any  # float32 [tokens, columns of qkv]


class Room(NamedTuple):
    """What one thread writes to, float32."""

    normed: Any  # [hidden]
    panels: Any  # a block of weights, keys or values
    part: Any  # [whole tiles of tokens, WIDTH of a block]
    up: Any  # the same
    queries: Any  # [whole tiles of QUERIES times heads, head_dim]
    scores: Any  # [the same, KEYS]
    sums: Any  # [the same, whole panels of head_dim]
    top: Any  # [the same]
    total: Any  # [the same]
    tiles: Any  # uint8, `amx.configuration`


@compiled
def _norm_rows(model, weight, hidden, tokens, room, team):
    """tokens.inputs = norm(hidden), a thread's share of the tokens."""
    start, stop = _share(len(hidden), team)
    for t in range(start, stop):
        _norm(np.float32, weight, hidden[t], model.eps, room.normed)
        put(tokens.inputs, t, 0, room.normed)


@compiled
def _add_biases(model, bias, hidden, team):
    """hidden += the multiple of a bias at an address, if there is one, a share of the tokens."""
    start, stop = _share(len(hidden) if bias != 0 else 0, team)
    for t in range(start, stop):
        row = hidden[t]
        for i in range(len(row)):
            row[i] += model.residual_multiplier * load(np.float32, bias, i)


@compiled
def _columns(matrix_columns, team):
    """The columns of a thread: whole cache lines, as far as there are."""
    start, stop = _share((matrix_columns + 63) // 64, team)
    return 64 * start, min(64 * stop, matrix_columns)


@compiled
def _fill_qkv(model, layer, tokens, room, count, team):
    start, stop = _columns((model.heads + 2 * model.kv_heads) * model.head_dim, team)
    for first in range(start, stop, WIDTH):
        columns = min(WIDTH, stop - first)
        multiply(model.qkv, layer, tokens.inputs, model.hidden, count, first, columns, room.panels,
                 room.part)  # fmt: skip
        for t in range(count):
            row, part = tokens.qkv[t, first : first + columns], room.part[t]
            for i in range(len(row)):
                row[i] = part[i]


@compiled
def _add_product(model, matrix, layer, x, inputs, hidden, room, team):
    """hidden += the multiple of x times a matrix, a thread's share of the columns."""
    count = len(hidden)
    start, stop = _columns(hidden.shape[1], team)
    for first in range(start, stop, WIDTH):
        columns = min(WIDTH, stop - first)
        multiply(matrix, layer, x, inputs, count, first, columns, room.panels, room.part)
        for t in range(count):
            row, part = hidden[t, first : first + columns], room.part[t]
            for i in range(len(row)):
                row[i] += model.residual_multiplier * part[i]


@compiled
def _fill_cache(model, layer, tokens, position, count, team):
    """Complete a thread's share of the tokens' queries, keys and values; cache the latter two."""
    size, vectors, pairs = model.head_dim, model.vectors[layer], model.pairs[layer]
    head_bytes = address_of(model.dtype, 0, model.length * size)
    start, stop = _share(count, team)
    for t in range(start, stop):
        qkv, at = tokens.qkv[t], position + t
        add_bias(vectors[QKV_BIAS], qkv, 0, len(qkv))
        cos, sin = model.cos[at, :pairs], model.sin[at, :pairs]
        for head in range(model.heads + model.kv_heads):
            row = qkv[head * size : (head + 1) * size]
            weight = vectors[Q_NORM] if head < model.heads else vectors[K_NORM]
            if weight != 0:
                _norm(model.dtype, weight, row, model.eps, row)
            _rotate(row, cos, sin)
        for group in range(model.kv_heads):
            base = (layer * model.kv_heads + group) * head_bytes
            key = (model.heads + group) * size
            value = key + model.kv_heads * size
            keys, values = qkv[key : key + size], qkv[value : value + size]
            for i in range(len(keys)):
                store(model.dtype, model.keys + base, at * size + i, keys[i])
                store(model.dtype, model.values + base, at * size + i, values[i])


@compiled
def _attention(model, layer, tokens, room, position, count, team):
    """tokens.inputs = what the heads see, blocks of tokens being dealt out to the threads."""
    size, window = model.head_dim, model.windows[layer]
    head_bytes = address_of(model.dtype, 0, model.length * size)
    heads = model.heads // model.kv_heads
    blocks = (count + QUERIES - 1) // QUERIES
    for unit in range(team.thread, blocks * model.kv_heads, team.threads):
        block, group = unit // model.kv_heads, unit % model.kv_heads
        first = block * QUERIES
        n = min(QUERIES, count - first)
        for r in range(heads * n):
            query = (group * heads + r // n) * size
            row, values = room.queries[r], tokens.qkv[first + r % n, query : query + size]
            scale = model.query_scales[position + first + r % n]
            for d in range(len(values)):
                row[d] = values[d] * scale
        at = (layer * model.kv_heads + group) * head_bytes
        attend_block(model, room, model.keys + at, model.values + at, window, position + first, n,
                     heads * n)  # fmt: skip
        for r in range(heads * n):
            query, seen = (group * heads + r // n) * size, room.sums[r, :size]
            for d in range(len(seen)):
                seen[d] /= room.total[r]
            put(tokens.inputs, first + r % n, query, seen)


@compiled
def _fill_inner(model, layer, tokens, room, count, team):
    """tokens.inner = SiLU(gate) * up, a thread's share of the columns."""
    start, stop = _columns(model.inner, team)
    gate, up = room.part, room.up
    for first in range(start, stop, WIDTH):
        columns = min(WIDTH, stop - first)
        for part, column in ((gate, first), (up, model.inner + first)):
            multiply(model.gate_up, layer, tokens.inputs, model.hidden, count, column, columns,
                     room.panels, part)  # fmt: skip
        for t in range(count):
            gates, ups = gate[t, :columns], up[t]
            for i in range(len(gates)):
                gates[i] = gates[i] / (np.float32(1) + exp(-gates[i])) * ups[i]
            put(tokens.inner, t, first, gates)


@compiled
def _layer(team, model, layer, tokens, room, hidden, position):
    count, vectors = len(hidden), model.vectors[layer]
    _norm_rows(model, vectors[INPUT_NORM], hidden, tokens, room, team)
    _wait(team)
    _fill_qkv(model, layer, tokens, room, count, team)
    _wait(team)
    _fill_cache(model, layer, tokens, position, count, team)
    _wait(team)
    _attention(model, layer, tokens, room, position, count, team)
    _wait(team)
    _add_product(model, model.o, layer, tokens.inputs, model.heads * model.head_dim, hidden, room,
                 team)  # fmt: skip
    _wait(team)
    _add_biases(model, vectors[O_BIAS], hidden, team)
    _norm_rows(model, vectors[POST_NORM], hidden, tokens, room, team)
    _wait(team)
    _fill_inner(model, layer, tokens, room, count, team)
    _wait(team)
    _add_product(model, model.down, layer, tokens.inner, model.inner, hidden, room, team)
    _wait(team)


@_cached
def run_layers(team, model, tokens, room, hidden, position, first, last):
    """Take hidden [tokens, hidden] through layers first to last, in place.

    Args:
        team: this thread's.
        model: the weights, and the cache, which gains the tokens' keys and values.
        tokens: the threads'.
        room: this thread's.
        hidden: float32, the threads'.
        position: of the first token.
    """
    team, model, tokens, room = borrow(team), borrow(model), borrow(tokens), borrow(room)
    hidden, units = borrow(hidden), tokens.inputs.ndim == 3
    if units:
        configure(room.tiles.ctypes.data)
    for layer in range(first, last):
        for start in range(0, len(hidden), CHUNK):
            stop = min(start + CHUNK, len(hidden))
            _layer(team, model, layer, tokens, room, hidden[start:stop], position + start)
    if units:
        restore(room.tiles.ctypes.data)


@_cached
def answer(team, model, hidden, normed, logits):
    """logits [tokens, vocab] = lm_head(norm(hidden)), a thread's share; all float32."""
    team, model, hidden = borrow(team), borrow(model), borrow(hidden)
    normed, logits = borrow(normed), borrow(logits)
    start, stop = _share(len(hidden), team)
    for t in range(start, stop):
        _norm(np.float32, model.norm, hidden[t], model.eps, normed[t])
    _wait(team)
    row_bytes = address_of(model.lm_head_dtype, 0, model.hidden)
    start, stop = _share(model.vocab, team)
    for first in range(start, stop, _ROWS):
        rows, last = model.lm_head + first * row_bytes, min(first + _ROWS, stop)
        for t in range(len(normed)):
            out, x = logits[t, first:last], normed[t].ctypes.data
            dots(model.lm_head_dtype, rows, row_bytes, x, model.hidden, out)
            for i in range(len(out)):
                scale = model.logits_multiplier
                if model.lm_head_scales != 0:
                    scale *= load(np.float32, model.lm_head_scales, first + i)
                out[i] *= scale
