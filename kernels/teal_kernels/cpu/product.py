# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""Products of several tokens with a matrix: weights are turned to floats by blocks that stay in
the cache, each of them once.

Tokens are float32 [tokens, inputs], or, for AMX, uint16 [2, tokens / SIDE, inputs * SIDE]: both
parts of each value (see `amx`), the SIDE x STEP of a tile side by side. Rows of their own would lie
on more pages than the core knows the addresses of.
"""

from __future__ import annotations

import numpy as np
from numba.extending import overload

from teal_kernels.cpu import amx
from teal_kernels.cpu.amx import SIDE, STEP, split, store_pair, unpack_pairs
from teal_kernels.cpu.intrinsics import load, store
from teal_kernels.cpu.rows import compiled
from teal_kernels.cpu.tiles import (
    COLUMNS,
    TOKENS,
    add_half_tile,
    add_quarter_tile,
    add_tile,
    unpack,
)
from teal_kernels.cpu.vectors import HALF

# Rows and columns of a block. As floats it takes half of the second-level cache of most machines.
DEPTH, WIDTH = 128, 512
# Bytes of a panel, COLUMNS or SIDE of a block's columns: whole lines more than a power of two keep
# panels off each other's sets of the cache.
PANEL, PAIRS = DEPTH * COLUMNS * 4 + 128, DEPTH * SIDE * 2 + 64
_SECOND = WIDTH // SIDE * PAIRS  # from first parts to second ones
BLOCK_BYTES = max(WIDTH // COLUMNS * PANEL, 2 * _SECOND)
_AHEAD = 8  # rows that are fetched before they are unpacked


@compiled
def _place(matrix, row):
    """Where an intrinsic finds a row: its address, columns a group, groups, address of scales."""
    groups = 0 if matrix.group == 0 else (matrix.offsets[-1] + matrix.group - 1) // matrix.group
    return row, matrix.group, groups, row + matrix.stride - 4 * groups


@compiled
def _weight(matrix, row, column):
    value = load(matrix.dtype, row, column)
    if matrix.group == 0:
        return value
    _, group, groups, scales = _place(matrix, row)
    g = column // group
    return value * load(HALF, scales, g) + load(HALF, scales, groups + g)


@compiled
def _panels(matrix, first, columns, width):
    """Whole panels of the columns from `first` on, each of them in one group."""
    alike = matrix.group == 0 or (matrix.group % width == 0 and first % width == 0)
    return columns // width if alike else 0


@compiled
def _unpack(matrix, row, depth, first, columns, panels):
    """`depth` rows from the one at an address on, columns first to first + columns, to panels."""
    whole, ahead = _panels(matrix, first, columns, COLUMNS), _AHEAD * matrix.stride
    for k in range(depth):
        to = panels + k * COLUMNS * 4
        unpack(matrix.dtype, _place(matrix, row), first, whole, ahead, to, PANEL)
        for i in range(whole * COLUMNS, columns):
            at = to + i // COLUMNS * PANEL
            store(np.float32, at, i % COLUMNS, _weight(matrix, row, first + i))
        row += matrix.stride


@compiled
def _unpack_pairs(matrix, row, depth, first, columns, panels):
    """The same for AMX, pairs of rows side by side, and zeros up to whole steps."""
    whole, ahead = _panels(matrix, first, columns, SIDE), _AHEAD * matrix.stride
    for k in range(0, (depth + STEP - 1) // STEP * STEP, 2):
        other, to = row + matrix.stride, panels + k * SIDE * 2
        done = 0
        if k + 1 < depth:
            unpack_pairs(matrix.dtype, _place(matrix, row), matrix.stride, first, whole, ahead,
                         to, PAIRS, _SECOND)  # fmt: skip
            done = whole * SIDE
        for i in range(done, columns):
            a = b = np.float32(0)
            if k < depth:
                a = _weight(matrix, row, first + i)
            if k + 1 < depth:
                b = _weight(matrix, other, first + i)
            at = to + i // SIDE * PAIRS + i % SIDE * 4
            store_pair(a, b, at, at + _SECOND)
        row = other + matrix.stride


@compiled
def add_tiles(x, x_step, tokens, depth, panels, panel_bytes, columns, to, to_step):
    """to[:tokens, :columns] += x[:tokens, :depth] @ the panels; all by address, steps in bytes.

    Whole tiles are computed: what is beyond the tokens and columns is garbage.
    """
    for p in range(0, columns, COLUMNS):
        panel = panels + p // COLUMNS * panel_bytes
        t = 0
        while t < tokens:
            left = tokens - t
            values, target = x + t * x_step, to + t * to_step + p * 4
            if left > TOKENS // 2:
                add_tile(values, x_step, panel, depth, target, to_step)
                t += TOKENS
            elif left > TOKENS // 4:
                add_half_tile(values, x_step, panel, depth, target, to_step)
                t += TOKENS // 2
            else:
                add_quarter_tile(values, x_step, panel, depth, target, to_step)
                t += TOKENS // 4


@compiled
def _add_pairs(dtype, x, x_step, x_low, tokens, depth, panels, columns, to, to_step):
    """The same for AMX."""
    steps = (depth + STEP - 1) // STEP
    for p in range(0, columns, 2 * SIDE):
        panel = panels + p // SIDE * PAIRS
        for t in range(0, tokens, 2 * SIDE):
            values, target = x + t // SIDE * x_step, to + t * to_step + p * 4
            if tokens - t > SIDE:
                amx.add_two_tiles(dtype, values, x_step, x_low, panel, PAIRS, _SECOND, steps,
                                  target, to_step)  # fmt: skip
            else:
                amx.add_tile(dtype, values, x_step, x_low, panel, PAIRS, _SECOND, steps,
                             target, to_step)  # fmt: skip


def put(x, token, first, values):
    """x[token, first :] = float32 values."""


@overload(put)
def _typed_put(x, token, first, values):
    def floats(x, token, first, values):
        row = x[token, first : first + len(values)]
        for i in range(len(row)):
            row[i] = values[i]

    def parts(x, token, first, values):
        done = 0
        while done < len(values):
            column = first + done
            count = min(STEP - column % STEP, len(values) - done)
            at = column // STEP * SIDE * STEP + token % SIDE * STEP + column % STEP
            row, second = x[0, token // SIDE, at : at + count], x[1, token // SIDE, at:]
            part = values[done:]
            for i in range(len(row)):
                row[i], second[i] = split(part[i])
            done += count

    return floats if x.ndim == 2 else parts


def _add_block(matrix, row, x, k, depth, tokens, first, columns, panels, part):
    """part[:tokens, :columns] += x[:tokens, k : k + depth] times rows from an address on."""


@overload(_add_block)
def _typed_add_block(matrix, row, x, k, depth, tokens, first, columns, panels, part):
    def floats(matrix, row, x, k, depth, tokens, first, columns, panels, part):
        _unpack(matrix, row, depth, first, columns, panels)
        add_tiles(x.ctypes.data + 4 * k, x.strides[0], tokens, depth, panels, PANEL, columns,
                  part.ctypes.data, part.strides[0])  # fmt: skip

    def parts(matrix, row, x, k, depth, tokens, first, columns, panels, part):
        _unpack_pairs(matrix, row, depth, first, columns, panels)
        _add_pairs(matrix.dtype, x.ctypes.data + 2 * SIDE * k, x.strides[1], x.strides[0], tokens,
                   depth, panels, columns, part.ctypes.data, part.strides[0])  # fmt: skip

    return floats if x.ndim == 2 else parts


@compiled
def multiply(matrix, layer, x, inputs, tokens, first, columns, panels, part):
    """part[:tokens, :columns] = x @ columns first to first + columns (at most WIDTH).

    Args:
        matrix: of every layer.
        x: the tokens; rows and columns up to whole tiles and steps are finite.
        panels: room for BLOCK_BYTES.
        part: float32 [whole tiles, whole panels].
    """
    for t in range(tokens):
        row = part[t, :columns]
        for i in range(len(row)):
            row[i] = 0
    for k in range(0, inputs, DEPTH):
        row = matrix.addresses[layer] + k * matrix.stride
        depth = min(DEPTH, inputs - k)
        _add_block(matrix, row, x, k, depth, tokens, first, columns, panels.ctypes.data, part)
    if matrix.scales[layer] != 0:
        scales = matrix.scales[layer] + 4 * first
        for t in range(tokens):
            row = part[t, :columns]
            for i in range(len(row)):
                row[i] *= load(np.float32, scales, i)
