# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""Attention of several tokens over the cache, in blocks of queries and of keys.

As in FlashAttention (arXiv 2205.14135, algorithm 1): no more than a block of scores is held, and
sums are rescaled where a later block holds a larger score.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from teal_kernels.cpu.fragments import FRAGMENT, compiled
from teal_kernels.cpu.intrinsics import address_of, exp, load
from teal_kernels.cpu.panels import add_tiles
from teal_kernels.cpu.tiles import COLUMNS, SQUARE, unpack, unpack_turned

# Tokens and cached positions of a block. All query heads of a key-value head are taken together.
QUERIES, KEYS = 16, 128


@compiled
def _unpack_keys(dtype, keys, count, size, panels):
    """`count` keys at an address, transposed: panels of [size, COLUMNS] float32."""
    keys_done, size_done = count // SQUARE * SQUARE, size // SQUARE * SQUARE
    stride = address_of(dtype, 0, size)
    for j in range(0, keys_done, SQUARE):
        panel = panels[j // COLUMNS * size * COLUMNS + j % COLUMNS :].ctypes.data
        unpack_turned(dtype, keys + j * stride, stride, size // SQUARE, panel)
    for j in range(count):
        panel = panels[j // COLUMNS * size * COLUMNS + j % COLUMNS :]
        for d in range(size_done if j < keys_done else 0, size):
            panel[d * COLUMNS] = load(dtype, keys, j * size + d)


@compiled
def _unpack_values(dtype, values, count, size, panels):
    """`count` values at an address: panels of [count, COLUMNS] float32."""
    whole, step, row_bytes = size // COLUMNS, count * COLUMNS * 4, address_of(dtype, 0, size)
    for j in range(count):
        row, to = values + j * row_bytes, panels[j * COLUMNS :]
        unpack(dtype, (row, 0, 1, row), 0, whole, 0, to.ctypes.data, step)
        for d in range(whole * COLUMNS, size):
            to[d // COLUMNS * count * COLUMNS + d % COLUMNS] = load(dtype, row, d)


@njit(**FRAGMENT, fastmath={"reassoc"})  # of many lanes
def _sum(values):
    total = np.float32(0)
    for i in range(len(values)):
        total += values[i]
    return total


@compiled
def _weigh_scores(scores, low, high, top, total, sums):
    """Turn a row's visible scores into weights, the others into 0; rescale what it summed up.

    Returns: the row's new largest score and sum of weights.
    """
    if low >= high:  # a window may end before this block
        for j in range(len(scores)):
            scores[j] = 0
        return top, total
    largest, seen = top, scores[low:high]
    for j in range(len(seen)):
        if seen[j] > largest:
            largest = seen[j]
    rescale = exp(top - largest)
    for j in range(low):
        scores[j] = 0
    for j in range(len(seen)):
        seen[j] = exp(seen[j] - largest)
    for j in range(high, len(scores)):
        scores[j] = 0
    added = _sum(seen)
    for d in range(len(sums)):
        sums[d] *= rescale
    return largest, total * rescale + added


@compiled
def attend_block(model, room, keys, values, window, position, count, begin, queries):
    """Attention of a block: queries [rows, head_dim] of `count` tokens from `position` on.

    The result stays in room.sums. Row r belongs to token (begin + r) % count. `keys` and `values`
    are addresses of [length, head_dim]; what the tokens see is cached.
    """
    size, last = model.head_dim, position + count
    first = 0 if window == 0 else max(0, position + 1 - window)
    row_bytes = address_of(model.dtype, 0, size)
    scores, sums, panels = room.scores, room.sums, room.panels
    for r in range(queries):
        room.top[r] = -np.inf
        room.total[r] = 0
        row = sums[r]
        for d in range(len(row)):
            row[d] = 0
    for start in range(first, last, KEYS):
        n = min(KEYS, last - start)
        _unpack_keys(model.dtype, keys + start * row_bytes, n, size, panels)
        for r in range(queries):
            row = scores[r]
            for j in range(len(row)):
                row[j] = 0
        add_tiles(room.queries.ctypes.data, room.queries.strides[0], queries, size,
                  panels.ctypes.data, size * COLUMNS * 4, n,
                  scores.ctypes.data, scores.strides[0])  # fmt: skip
        for r in range(queries):
            seen = position + (begin + r) % count + 1  # the token itself included
            low = 0 if window == 0 else max(0, seen - window - start)
            high = min(n, seen - start)
            room.top[r], room.total[r] = _weigh_scores(
                scores[r, :n], low, high, room.top[r], room.total[r], sums[r, :size]
            )
        _unpack_values(model.dtype, values + start * row_bytes, n, size, panels)
        add_tiles(scores.ctypes.data, scores.strides[0], queries, n,
                  panels.ctypes.data, n * COLUMNS * 4, size,
                  sums.ctypes.data, sums.strides[0])  # fmt: skip
