# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""Products of several tokens with a matrix, each weight of which is read from memory once.

A thread takes columns of a matrix, or rows of it for up to FEW tokens, whose sums are short enough
to be added up: whole rows are read faster. For few, floats are multiplied as they are read; else
weights are unpacked by blocks that stay in the cache. For AMX the tokens are unpacked as well, the
SIDE x STEP of a tile side by side: rows of their own would lie on more pages than the core knows
the addresses of.
"""

from __future__ import annotations

import numpy as np
from numba import types

from teal_kernels.cpu import integers
from teal_kernels.cpu.amx import SIDE, STEP, split
from teal_kernels.cpu.fragments import compiled, overloaded
from teal_kernels.cpu.int4 import in_order
from teal_kernels.cpu.intrinsics import address_of, load
from teal_kernels.cpu.panels import (
    DEPTH,
    PANEL,
    add_pairs,
    add_tiles,
    unpack_block,
    unpack_pair_block,
)
from teal_kernels.cpu.quads import in_quads
from teal_kernels.cpu.quads_few import (
    BLOCK_ROWS,
    INPUT_BYTES,
    add_fours_to_2,
    add_fours_to_5,
    add_fours_to_8,
    split_rows,
)
from teal_kernels.cpu.rows import dots
from teal_kernels.cpu.tiles import (
    ROWS_OF_5,
    ROWS_OF_8,
    add_to_2,
    add_to_5,
    add_to_8,
    dot_5,
    dot_8,
    scale_row,
)
from teal_kernels.cpu.vectors import AHEAD, BLOCK

WIDTH = integers.WIDTH  # the most columns of a product of more than FEW tokens
_FEW_ROWS = 16  # that are added at a time


@compiled
def _parts(x, token, inputs):
    """Both parts of a token's values (see `amx`), zeros up to whole steps."""
    steps, second = (inputs + STEP - 1) // STEP, len(x.parts) // 4
    at = (token // SIDE * steps * SIDE + token % SIDE) * STEP
    parts, values = x.parts.view(np.uint16), x.values[token]
    for k in range(0, steps * STEP, STEP):
        count = min(STEP, inputs - k)
        row, low, own = parts[at : at + STEP], parts[second + at : second + at + STEP], values[k:]
        for i in range(count):
            row[i], low[i] = split(own[i])
        for i in range(count, STEP):
            row[i] = low[i] = 0
        at += SIDE * STEP


def by_units(x):
    """Whether inputs of numba's type `x` are multiplied on AMX."""
    return x.types[x.fields.index("parts")].dtype == types.uint8


def _kinds(matrix, x):
    """numba's type of a matrix's values, and whether its products are AMX's."""
    return matrix.types[matrix.fields.index("dtype")].instance_type, by_units(x)


def _prepare(matrix, x, token, inputs):
    """Turn a token's values to what AMX multiplies with a matrix, if it does."""


@overloaded(_prepare)
def _typed_prepare(matrix, x, token, inputs):
    kind, units = _kinds(matrix, x)

    def nothing(matrix, x, token, inputs):
        pass

    def fixed(matrix, x, token, inputs):
        integers.prepare(matrix.dtype, 1 + (matrix.group != 0), x, token, 0, inputs)

    def parts(matrix, x, token, inputs):
        _parts(x, token, inputs)

    if not units:
        return nothing
    return fixed if kind in (types.int8, types.uint8) else parts


@compiled
def prepare(matrix, x, start, stop, inputs):
    """Turn tokens start to stop to what `multiply` reads."""
    for t in range(start, stop):
        _prepare(matrix, x, t, inputs)


@compiled
def _add_whole_rows(matrix, row, rows, ahead, x, tokens, columns, part):
    """part[:tokens, :columns] += x[:tokens, :rows] times rows from an address on, unscaled."""
    start, stride, to_step, blocks = row, matrix.stride, part.strides[0], columns // BLOCK
    to, x_step = part.ctypes.data, x.strides[0]
    values = x.ctypes.data
    if tokens <= 2:
        add_to_2(matrix.dtype, start, stride, rows, ahead, blocks, values, x_step, to, to_step)
    elif tokens <= 5:
        add_to_5(matrix.dtype, start, stride, rows, ahead, blocks, values, x_step, to, to_step)
    else:
        add_to_8(matrix.dtype, start, stride, rows, ahead, blocks, values, x_step, to, to_step)
    _add_columns(matrix, row, rows, x, tokens, blocks * BLOCK, columns, part)


@compiled
def _add_columns(matrix, row, rows, x, tokens, first, last, part):
    """The same for columns first to last, which are too few for vectors."""
    for column in range(first, last):
        for t in range(tokens):
            total = part[t, column]
            for k in range(rows):
                total += x[t, k] * load(matrix.dtype, row + k * matrix.stride, column)
            part[t, column] = total


@compiled
def _multiply_bytes(matrix, layer, x, start, stop, tokens, room, part):
    """INT8, four rows with one instruction where the CPU has it; what is left, as floats."""
    columns, stride, inputs = matrix.offsets[-1], matrix.stride, room.quads.ctypes.data
    whole, to, to_step = in_quads(columns), part.ctypes.data, part.strides[0]
    end = start + (stop - start) // BLOCK_ROWS * BLOCK_ROWS if whole > 0 else start
    for k in range(start, end, BLOCK_ROWS):
        row, following = matrix.addresses[layer] + k * stride, min(k + BLOCK_ROWS, end - BLOCK_ROWS)
        following = matrix.addresses[layer] + following * stride
        for t in range(tokens):
            split_rows(x.values[t, k:].ctypes.data, inputs + t * INPUT_BYTES)
        if tokens <= 2:
            add_fours_to_2(row, stride, following, whole, inputs, to, to_step)
        elif tokens <= 5:
            add_fours_to_5(row, stride, following, whole, inputs, to, to_step)
        else:
            add_fours_to_8(row, stride, following, whole, inputs, to, to_step)
    if start < end:
        for t in range(tokens):
            in_order(matrix.dtype, part[t].ctypes.data, whole)
    for k in range(start, end, BLOCK_ROWS):
        _add_columns(matrix, matrix.addresses[layer] + k * stride, BLOCK_ROWS,
                     x.values[:, k : k + BLOCK_ROWS], tokens, whole, columns, part)  # fmt: skip
    _multiply_as_read(matrix, layer, x, end, stop, tokens, part)


@compiled
def _multiply_as_read(matrix, layer, x, start, stop, tokens, part):
    columns = matrix.offsets[-1]
    for k in range(start, stop, _FEW_ROWS):
        rows = min(_FEW_ROWS, stop - k)
        ahead = min(_FEW_ROWS, stop - rows - k) * matrix.stride  # another's are not for us to fetch
        _add_whole_rows(matrix, matrix.addresses[layer] + k * matrix.stride, rows, ahead,
                        x.values[:, k : k + rows], tokens, columns, part)  # fmt: skip


@compiled
def _multiply_floats(matrix, layer, x, begin, stop, tokens, first, columns, room, part):
    to, to_step, panels = part.ctypes.data, part.strides[0], room.panels.ctypes.data
    for start in range(0, columns, WIDTH):
        count = min(WIDTH, columns - start)
        for k in range(begin, stop, DEPTH):
            row, depth = matrix.addresses[layer] + k * matrix.stride, min(DEPTH, stop - k)
            unpack_block(matrix, row, depth, first + start, count, panels)
            add_tiles(x.values.ctypes.data + 4 * k, x.values.strides[0], tokens, depth, panels,
                      PANEL, count, to + 4 * start, to_step)  # fmt: skip


@compiled
def _multiply_pairs(matrix, layer, x, inputs, tokens, first, columns, room, part):
    steps, low = (inputs + STEP - 1) // STEP, len(x.parts) // 2
    for k in range(0, inputs, DEPTH):
        row = matrix.addresses[layer] + k * matrix.stride
        depth, panels = min(DEPTH, inputs - k), room.panels.ctypes.data
        unpack_pair_block(matrix, row, depth, first, columns, panels)
        add_pairs(matrix.dtype, x.parts.ctypes.data + 2 * SIDE * k, 2 * steps * SIDE * STEP, low,
                  tokens, depth, panels, columns, part.ctypes.data, part.strides[0])  # fmt: skip


@compiled
def _clear(part, tokens, columns):
    for t in range(tokens):
        row = part[t, :columns]
        for i in range(len(row)):
            row[i] = 0


@compiled
def _scale(matrix, layer, tokens, first, columns, part):
    """Multiply sums with the scales of their columns, where there are any."""
    if matrix.scales[layer] != 0:
        scales = matrix.scales[layer] + 4 * first
        for t in range(tokens):
            scale_row(part[t].ctypes.data, scales, columns)


def _multiply(matrix, layer, x, inputs, tokens, first, columns, room, part):
    """part[:tokens, :columns] += x times columns from `first` on, but for the columns' scales."""


@overloaded(_multiply)
def _typed_multiply(matrix, layer, x, inputs, tokens, first, columns, room, part):
    """Choose when numba compiles, so that nothing is compiled that this CPU does not need."""
    kind, units = _kinds(matrix, x)

    def floats(matrix, layer, x, inputs, tokens, first, columns, room, part):
        _multiply_floats(matrix, layer, x, 0, inputs, tokens, first, columns, room, part)

    def codes(matrix, layer, x, inputs, tokens, first, columns, room, part):
        integers.multiply_integers(matrix, layer, x, 0, inputs, tokens, first, columns, room, part)

    def packed(matrix, layer, x, inputs, tokens, first, columns, room, part):
        if integers.fits(matrix, first):
            integers.multiply_integers(
                matrix, layer, x, 0, inputs, tokens, first, columns, room, part
            )
        else:
            _multiply_floats(matrix, layer, x, 0, inputs, tokens, first, columns, room, part)

    if not units:
        return floats
    return {types.int8: codes, types.uint8: packed}.get(kind, _multiply_pairs.py_func)


@compiled
def multiply(matrix, layer, x, inputs, tokens, first, columns, room, part):
    """part[:tokens, :columns] = x @ columns first to first + columns, at most WIDTH.

    Args:
        matrix: of every layer.
        x: the tokens, prepared for this matrix; their rows up to whole tiles are there.
        room: of this thread, to work in.
        part: float32 [whole tiles, whole panels].
    """
    _clear(part, tokens, columns)
    _multiply(matrix, layer, x, inputs, tokens, first, columns, room, part)
    _scale(matrix, layer, tokens, first, columns, part)


def _multiply_few(matrix, layer, x, start, stop, tokens, room, part):
    """part[:tokens] += x times rows start to stop, but for the columns' scales."""


@overloaded(_multiply_few)
def _typed_multiply_few(matrix, layer, x, start, stop, tokens, room, part):
    kind, units = _kinds(matrix, x)

    def as_read(matrix, layer, x, start, stop, tokens, room, part):
        _multiply_as_read(matrix, layer, x, start, stop, tokens, part)

    def floats(matrix, layer, x, start, stop, tokens, room, part):
        columns = matrix.offsets[-1]
        _multiply_floats(matrix, layer, x, start, stop, tokens, 0, columns, room, part)

    def packed(matrix, layer, x, start, stop, tokens, room, part):
        columns = matrix.offsets[-1]
        if not integers.fits(matrix, 0):
            _multiply_floats(matrix, layer, x, start, stop, tokens, 0, columns, room, part)
            return
        for t in range(tokens):
            integers.prepare(matrix.dtype, 2, x, t, start, stop - start)
        integers.multiply_integers(matrix, layer, x, start, stop, tokens, 0, columns, room, part)

    def in_bytes(matrix, layer, x, start, stop, tokens, room, part):
        _multiply_bytes(matrix, layer, x, start, stop, tokens, room, part)

    if kind is types.uint8:
        return packed if units else floats
    return in_bytes if kind is types.int8 else as_read


@compiled
def multiply_few(matrix, layer, x, start, stop, tokens, room, part):
    """part[:tokens] = x[:, start:stop] @ rows start to stop, of up to FEW tokens.

    Args:
        matrix: of every layer.
        x: the tokens; their rows up to whole tiles are there. What AMX reads of them is made here.
        room: of this thread, to work in.
        part: float32 [whole tiles, whole panels].
    """
    columns = matrix.offsets[-1]
    _clear(part, tokens, columns)
    if start < stop:
        _multiply_few(matrix, layer, x, start, stop, tokens, room, part)
        _scale(matrix, layer, tokens, 0, columns, part)


@compiled
def dot_few(dtype, base, stride, x, size, tokens, out):
    """out[:tokens] = x[:tokens, :size] times as many rows from an address on as out has columns.

    x, out: [FEW, inputs] and [FEW, rows] float32; beyond the tokens they hold anything.
    """
    count, done, columns = out.shape[1], 0, 64 // address_of(dtype, 0, 1)
    to, x_step, to_step = out.ctypes.data, x.strides[0], out.strides[0]
    lines = size // columns
    if tokens > 1:
        rows = ROWS_OF_5 if tokens <= 5 else ROWS_OF_8
        ahead, done = rows * stride * (1 + AHEAD // (rows * stride)), count // rows * rows
        for r in range(0, done, rows):
            row, place = base + r * stride, to + 4 * r
            if tokens <= 5:
                dot_5(dtype, row, stride, ahead, x.ctypes.data, x_step, lines, place, to_step)
            else:
                dot_8(dtype, row, stride, ahead, x.ctypes.data, x_step, lines, place, to_step)
        for t in range(tokens):
            for column in range(lines * columns, size):
                for r in range(done):
                    out[t, r] += x[t, column] * load(dtype, base + r * stride, column)
    if done < count:
        for t in range(tokens):
            dots(dtype, base + done * stride, stride, x[t].ctypes.data, size, out[t, done:])
