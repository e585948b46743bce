# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""A layer for up to FEW tokens at once, dense, as a step takes one token through it.

The threads share a matrix's rows, and whoever reads a result adds their sums up. Every thread holds
the residual stream.
"""

from __future__ import annotations

import numpy as np

from teal_kernels.cpu.compiled import _norm, _share, _wait
from teal_kernels.cpu.fragments import compiled
from teal_kernels.cpu.intrinsics import exp, load
from teal_kernels.cpu.layers import Inputs, attention, fill_cache
from teal_kernels.cpu.product import multiply_few
from teal_kernels.cpu.structures import INPUT_NORM, O_BIAS, POST_NORM

_ROWS = 32  # of a matrix, that a thread gets together: two lines of inputs


@compiled
def _rows(count, team):
    """The rows of a thread."""
    start, stop = _share((count + _ROWS - 1) // _ROWS, team)
    return _ROWS * start, min(_ROWS * stop, count)


@compiled
def _add_others(parts, me, t, start, stop):
    """parts[me, t, start:stop] += what the other threads have there."""
    mine = parts[me, t, start:stop]
    for thread in range(len(parts)):
        if thread != me:
            part = parts[thread, t, start:stop]
            for i in range(len(mine)):
                mine[i] += part[i]


@compiled
def _product_of_norm(model, matrix, layer, weight, tokens, room, count, team):
    """tokens.wide = a thread's part of a matrix times the normed residual stream."""
    x = room.normed
    for t in range(count):
        _norm(np.float32, weight, room.hidden[t], model.eps, x.values[t, : model.hidden])
    start, stop = _rows(model.hidden, team)
    multiply_few(matrix, layer, x, start, stop, count, room, tokens.wide[team.thread])
    _wait(team)


@compiled
def _add_product(model, matrix, layer, values, start, stop, bias, tokens, room, count, team):
    """The residual stream += the multiple of a thread's values, start to stop, times o or down.

    bias: address, or 0.
    """
    x = Inputs(values, room.normed.parts, room.normed.scales)
    multiply_few(matrix, layer, x, start, stop, count, room, tokens.narrow[team.thread])
    _wait(team)
    for t in range(count):
        hidden = room.hidden[t]
        for thread in range(team.threads):
            part = tokens.narrow[thread, t, : len(hidden)]
            for i in range(len(hidden)):
                hidden[i] += model.residual_multiplier * part[i]
        for i in range(len(hidden) if bias != 0 else 0):
            hidden[i] += model.residual_multiplier * load(np.float32, bias, i)


@compiled
def layer_of_few(team, model, layer, tokens, room, count, position):
    """room.hidden [count, hidden] through a layer, in place, from a position on."""
    vectors, me = model.vectors[layer], team.thread
    _product_of_norm(model, model.qkv, layer, vectors[INPUT_NORM], tokens, room, count, team)
    start, stop = _share(count, team)
    for t in range(start, stop):
        qkv = tokens.qkv[t]
        _add_others(tokens.wide, me, t, 0, len(qkv))
        for i in range(len(qkv)):
            qkv[i] = tokens.wide[me, t, i]
    fill_cache(model, layer, tokens, position, count, team)
    _wait(team)
    attention(model, layer, tokens, room, position, count, team)
    _wait(team)
    start, stop = _rows(model.heads * model.head_dim, team)
    _add_product(model, model.o, layer, tokens.inputs.values, start, stop, vectors[O_BIAS], tokens,
                 room, count, team)  # fmt: skip
    _product_of_norm(model, model.gate_up, layer, vectors[POST_NORM], tokens, room, count, team)
    start, stop = _rows(model.inner, team)
    for t in range(count):
        _add_others(tokens.wide, me, t, start, stop)
        _add_others(tokens.wide, me, t, model.inner + start, model.inner + stop)
        gate, up = tokens.wide[me, t, start:stop], tokens.wide[me, t, model.inner + start :]
        inner = tokens.inner.values[t, start:stop]
        for i in range(len(inner)):
            inner[i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i]
    _add_product(model, model.down, layer, tokens.inner.values, start, stop, 0, tokens, room, count,
                 team)  # fmt: skip
