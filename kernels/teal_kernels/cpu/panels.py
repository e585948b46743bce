# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""Blocks of weights that are turned to floats and stay in the cache, and their products."""

from __future__ import annotations

import numpy as np

from teal_kernels.cpu import amx
from teal_kernels.cpu.amx import SIDE, STEP, store_pair, unpack_pairs
from teal_kernels.cpu.fragments import compiled
from teal_kernels.cpu.intrinsics import load, store
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
def _panels(matrix, first, columns):
    """Whole panels of the columns from `first` on, each of them in one group."""
    alike = matrix.group == 0 or (matrix.group % COLUMNS == 0 and first % COLUMNS == 0)
    return columns // COLUMNS if alike else 0


@compiled
def unpack_block(matrix, row, depth, first, columns, panels):
    """`depth` rows from the one at an address on, columns first to first + columns, to panels."""
    whole, ahead = _panels(matrix, first, columns), _AHEAD * matrix.stride
    for k in range(depth):
        to = panels + k * COLUMNS * 4
        unpack(matrix.dtype, _place(matrix, row), first, whole, ahead, to, PANEL)
        for i in range(whole * COLUMNS, columns):
            at = to + i // COLUMNS * PANEL
            store(np.float32, at, i % COLUMNS, _weight(matrix, row, first + i))
        row += matrix.stride


@compiled
def unpack_pair_block(matrix, row, depth, first, columns, panels):
    """The same of floats for AMX, pairs of rows side by side, and zeros up to whole steps."""
    whole, ahead = columns // SIDE, _AHEAD * matrix.stride
    for k in range(0, (depth + STEP - 1) // STEP * STEP, 2):
        other, to = row + matrix.stride, panels + k * SIDE * 2
        done = 0
        if k + 1 < depth:
            unpack_pairs(matrix.dtype, row, matrix.stride, first, whole, ahead, to, PAIRS, _SECOND)
            done = whole * SIDE
        for i in range(done, columns):
            a = b = np.float32(0)
            if k < depth:
                a = load(matrix.dtype, row, first + i)
            if k + 1 < depth:
                b = load(matrix.dtype, other, first + i)
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
def add_pairs(dtype, x, x_step, x_low, tokens, depth, panels, columns, to, to_step):
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
