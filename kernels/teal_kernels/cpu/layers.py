# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""A layer for several tokens at once, dense.

The threads share tokens, columns or heads, and meet after each part of a layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from teal_kernels.cpu.attention import QUERIES, attend_block
from teal_kernels.cpu.compiled import _norm, _share, _wait
from teal_kernels.cpu.fragments import compiled
from teal_kernels.cpu.intrinsics import address_of, exp, load, store
from teal_kernels.cpu.product import WIDTH, multiply, prepare
from teal_kernels.cpu.rows import add_bias
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


class Inputs(NamedTuple):
    """What a matrix is multiplied with."""

    values: Any  # float32 [whole tiles of tokens, columns and some more]
    parts: Any  # what AMX multiplies instead (uint8); float32 and empty without it
    scales: Any  # float32 [whole tiles of tokens], of what is in `parts` as integers


class Tokens(NamedTuple):
    """What the threads hand to each other, a row for each of CHUNK tokens."""

    inputs: Inputs  # of qkv, o and gate_up
    inner: Inputs  # of down; its parts and scales are the same
    qkv: Any  # float32 [tokens, columns of qkv]
    # Sums of each thread's own rows for a few tokens, [threads, whole tiles, whole panels].
    wide: Any  # of qkv and gate_up
    narrow: Any  # of o and down


class Room(NamedTuple):
    """What one thread writes to, float32."""

    panels: Any  # a block of weights, keys or values
    part: Any  # [whole tiles of tokens, WIDTH and some more], sums of a block
    up: Any  # the same
    queries: Any  # [whole tiles of QUERIES times heads, head_dim]
    scores: Any  # [the same, KEYS]
    sums: Any  # [the same, whole panels of head_dim]
    top: Any  # [the same]
    total: Any  # [the same]
    tiles: Any  # uint8, `amx.configuration`
    # For integers on AMX, as `integers` has them.
    codes: Any  # int8
    products: Any  # int32 [4, tokens of a tile, columns of a tile]
    scaled: Any  # uint8
    factors: Any  # int16 [whole panels of groups, rows of a block]
    centres: Any  # [panels of groups, rows of a block, groups of a panel]
    largest: Any  # [whole panels of groups]
    each: Any  # [the same]
    offsets: Any  # [whole tiles of tokens, whole panels of groups]
    # For a few tokens.
    hidden: Any  # [FEW, hidden], the residual stream; every thread has the same
    normed: Inputs  # of qkv, gate_up and the lm_head; parts and scales are those of o and down
    quads: Any  # uint8 [FEW, INPUT_BYTES], a block of inputs as `quads_few` has it
    logits: Any  # [FEW, rows of the lm_head]


@compiled
def _norm_rows(model, matrix, weight, hidden, tokens, team):
    """tokens.inputs = norm(hidden), ready for a matrix; a thread's share of the tokens."""
    start, stop = _share(len(hidden), team)
    for t in range(start, stop):
        _norm(np.float32, weight, hidden[t], model.eps, tokens.inputs.values[t, : model.hidden])
    prepare(matrix, tokens.inputs, start, stop, model.hidden)


@compiled
def _prepare_all(matrix, x, inputs, count, team):
    """What several threads wrote gets ready for a matrix, and all wait for that, if it has to."""
    if len(x.parts) > 0:
        start, stop = _share(count, team)
        prepare(matrix, x, start, stop, inputs)
        _wait(team)


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
    part = room.part
    for first in range(start, stop, WIDTH):
        columns = min(WIDTH, stop - first)
        multiply(model.qkv, layer, tokens.inputs, model.hidden, count, first, columns, room, part)
        for t in range(count):
            row, sums = tokens.qkv[t, first : first + columns], part[t]
            for i in range(len(row)):
                row[i] = sums[i]


@compiled
def _add_product(model, matrix, layer, x, inputs, hidden, room, team):
    """hidden += the multiple of x times a matrix, a thread's share of the columns."""
    count = len(hidden)
    start, stop = _columns(hidden.shape[1], team)
    part = room.part
    for first in range(start, stop, WIDTH):
        columns = min(WIDTH, stop - first)
        multiply(matrix, layer, x, inputs, count, first, columns, room, part)
        for t in range(count):
            row, sums = hidden[t, first : first + columns], part[t]
            for i in range(len(row)):
                row[i] += model.residual_multiplier * sums[i]


@compiled
def _rotate(first, second, cos, sin):
    """Rotary embedding of a head in place, whose channels `first` are paired with `second`.

    As slices: what `compiled._rotate` does one value at a time, LLVM does for several here.
    """
    for i in range(len(first)):
        a, b = first[i], second[i]
        first[i] = a * cos[i] - b * sin[i]
        second[i] = b * cos[i] + a * sin[i]


@compiled
def fill_cache(model, layer, tokens, position, count, team):
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
            _rotate(row[:pairs], row[pairs:], cos, sin)
        for group in range(model.kv_heads):
            base = (layer * model.kv_heads + group) * head_bytes
            key = (model.heads + group) * size
            value = key + model.kv_heads * size
            keys, values = qkv[key : key + size], qkv[value : value + size]
            for i in range(len(keys)):
                store(model.dtype, model.keys + base, at * size + i, keys[i])
                store(model.dtype, model.values + base, at * size + i, values[i])


@compiled
def attention(model, layer, tokens, room, position, count, team):
    """tokens.inputs = what the heads see, blocks of tokens being dealt out to the threads."""
    size, window = model.head_dim, model.windows[layer]
    head_bytes = address_of(model.dtype, 0, model.length * size)
    heads = model.heads // model.kv_heads
    blocks, parts = (count + QUERIES - 1) // QUERIES, 1
    if blocks * model.kv_heads % team.threads != 0 and blocks == 1:
        parts = team.threads  # of a group's queries, so that all threads have as many
    for unit in range(team.thread, blocks * model.kv_heads * parts, team.threads):
        part, group = unit % parts, unit // parts % model.kv_heads
        block = unit // parts // model.kv_heads
        first = block * QUERIES
        n = min(QUERIES, count - first)
        begin, end = heads * n * part // parts, heads * n * (part + 1) // parts
        for r in range(begin, end):
            query = (group * heads + r // n) * size
            row, values = room.queries[r - begin], tokens.qkv[first + r % n, query : query + size]
            scale = model.query_scales[position + first + r % n]
            for d in range(len(values)):
                row[d] = values[d] * scale
        at = (layer * model.kv_heads + group) * head_bytes
        attend_block(model, room, model.keys + at, model.values + at, window, position + first, n,
                     begin, end - begin)  # fmt: skip
        for r in range(begin, end):
            query, seen = (group * heads + r // n) * size, room.sums[r - begin]
            out = tokens.inputs.values[first + r % n, query : query + size]
            for d in range(len(out)):
                out[d] = seen[d] / room.total[r - begin]


@compiled
def _fill_inner(model, layer, tokens, room, count, team):
    """tokens.inner = SiLU(gate) * up, a thread's share of the columns."""
    start, stop = _columns(model.inner, team)
    gate, up = room.part, room.up
    for first in range(start, stop, WIDTH):
        columns = min(WIDTH, stop - first)
        for part, column in ((gate, first), (up, model.inner + first)):
            multiply(model.gate_up, layer, tokens.inputs, model.hidden, count, column, columns,
                     room, part)  # fmt: skip
        for t in range(count):
            row, gates, ups = tokens.inner.values[t, first : first + columns], gate[t], up[t]
            for i in range(len(row)):
                row[i] = gates[i] / (np.float32(1) + exp(-gates[i])) * ups[i]


@compiled
def layer_of_many(team, model, layer, tokens, room, hidden, position):
    """hidden [up to CHUNK tokens, hidden] through a layer, in place, from a position on."""
    count, vectors = len(hidden), model.vectors[layer]
    _norm_rows(model, model.qkv, vectors[INPUT_NORM], hidden, tokens, team)
    _wait(team)
    _fill_qkv(model, layer, tokens, room, count, team)
    _wait(team)
    fill_cache(model, layer, tokens, position, count, team)
    _wait(team)
    attention(model, layer, tokens, room, position, count, team)
    _wait(team)
    seen = model.heads * model.head_dim
    _prepare_all(model.o, tokens.inputs, seen, count, team)
    _add_product(model, model.o, layer, tokens.inputs, seen, hidden, room, team)
    _wait(team)
    _add_biases(model, vectors[O_BIAS], hidden, team)
    _norm_rows(model, model.gate_up, vectors[POST_NORM], hidden, tokens, team)
    _wait(team)
    _fill_inner(model, layer, tokens, room, count, team)
    _wait(team)
    _prepare_all(model.down, tokens.inner, model.inner, count, team)
    _add_product(model, model.down, layer, tokens.inner, model.inner, hidden, room, team)
    _wait(team)
