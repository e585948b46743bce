# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""Products of several tokens with a matrix of INT8 or INT4 on x86's matrix units: codes are
multiplied as they are, in int32, and sums are brought to scale block by block.

Scales of INT4 belong to a row and a group of columns. They multiply the inputs, which a group then
has of its own; what stands for the code CENTRE is multiplied as floats.
"""

from __future__ import annotations

import numpy as np

from teal_kernels.cpu.amx import SIDE
from teal_kernels.cpu.codes import (
    CENTRE,
    CHUNK,
    STEP,
    TILE,
    interleave,
    largest_of,
    multiply_codes,
    place_of,
    raise_to,
    scale_tiles,
    settle,
    to_fixed,
)
from teal_kernels.cpu.intrinsics import address_of, load, prefetch
from teal_kernels.cpu.rows import compiled
from teal_kernels.cpu.tiles import FEW, NARROW, TOKENS, add_narrow_tile
from teal_kernels.cpu.vectors import HALF

# The most rows and columns of a block by the number of tokens: for up to FEW, rows are read in long
# stretches; for more, what a tile is multiplied with stays in the first-level cache.
_FEW_DEPTH, FEW_WIDTH = 128, 3072
_DEPTH, _WIDTH = 768, 512
_AHEAD = 8192  # bytes of rows that are fetched before they are interleaved, at least
_GAP = 64  # bytes between tiles: a line, which keeps them off each other's sets of the cache
# Room for a block's codes, its groups' scales, and a tile of inputs times those.
CODES = max(FEW_WIDTH * (_FEW_DEPTH + 4), _WIDTH * (_DEPTH + 4))
GROUPS = FEW_WIDTH // CHUNK
FACTORS = max(GROUPS * _FEW_DEPTH, _WIDTH // CHUNK * _DEPTH)
SCALED = 2 * _DEPTH * SIDE

_place_of = compiled(place_of)


@compiled
def fits(matrix, first):
    """Whether the columns of each chunk from a column on are of one group."""
    return matrix.group % CHUNK == 0 and first % CHUNK == 0


@compiled
def prepare(matrix, x, token, inputs):
    """Turn a token's values to fixed-point numbers that a product with the matrix reads."""
    largest = largest_of(x.values[token].ctypes.data, inputs)
    each = np.float32(32767) / largest if largest != 0 else np.float32(0)
    x.scales[token] = largest / np.float32(32767)
    steps, words = (inputs + STEP - 1) // STEP, 1 + (matrix.group != 0)
    to = x.parts.ctypes.data + (token // SIDE * steps * SIDE + token % SIDE) * STEP * words
    to_fixed(matrix.dtype, x.values[token].ctypes.data, each, steps, to, len(x.parts) // 2)


@compiled
def _interleave(matrix, row, depth, first, columns, codes, tile):
    """`depth` rows from the one at an address on, columns first to first + columns, to tiles."""
    packed, whole = matrix.group != 0, columns // CHUNK
    ahead = 4 * matrix.stride * (1 + _AHEAD // (4 * address_of(matrix.dtype, 0, columns)))
    for k in range(0, (depth + STEP - 1) // STEP * STEP, 4):
        done, at = 0, k // 4 * 64
        if k + 3 < depth:
            done = whole * CHUNK
            interleave(matrix.dtype, row, matrix.stride, first, whole, ahead,
                       codes.ctypes.data + at, tile)  # fmt: skip
        for column in range(done, columns):
            part, place = _place_of(packed, column % CHUNK)
            start = (column // CHUNK * 4 + part) * tile + at + place * 4
            for i in range(4):
                codes[start + i] = 0
                if k + i < depth:
                    code = load(matrix.dtype, row + i * matrix.stride, first + column)
                    codes[start + i] = np.int8(code - CENTRE * packed)
        row += 4 * matrix.stride


@compiled
def _weigh_groups(matrix, row, depth, first, last, most, room):
    """The scales of groups first to last in `depth` rows as fixed-point numbers of 16 bits.

    most: rows of a block; those of the next one are fetched.
    """
    groups = (matrix.offsets[-1] + matrix.group - 1) // matrix.group
    scales, largest = row + matrix.stride - 4 * groups, room.largest[: last - first]
    for g in range(len(largest)):
        largest[g] = 0
    for k in range(depth):
        at = scales + k * matrix.stride
        for line in range(2 * first, 2 * last + 63, 64):
            prefetch(at + most * matrix.stride + line)
            prefetch(at + most * matrix.stride + 2 * groups + line)
        raise_to(at + 2 * first, len(largest), largest.ctypes.data)
    for g in range(len(largest)):
        each = np.float32(32767) / largest[g] if largest[g] != 0 else np.float32(0)
        factors = room.factors[g * most : g * most + depth]
        for k in range(len(factors)):
            scale = load(HALF, scales + k * matrix.stride, first + g)
            factors[k] = np.int16(scale * each + np.float32(0.5))


@compiled
def _add_offsets(matrix, row, depth, first, last, x, k, tokens, room):
    """room.offsets[:tokens, : last - first] += inputs from k on times what CENTRE stands for."""
    groups = (matrix.offsets[-1] + matrix.group - 1) // matrix.group
    for i in range(depth):
        scales, panel = row + (i + 1) * matrix.stride - 4 * groups, room.panels[i * NARROW :]
        for g in range(first, last):
            offset = load(HALF, scales, groups + g) + np.float32(CENTRE) * load(HALF, scales, g)
            panel[(g - first) // NARROW * NARROW * depth + (g - first) % NARROW] = offset
    for p in range(0, last - first, NARROW):
        panel, to = room.panels[p * depth :].ctypes.data, room.offsets[0, p:].ctypes.data
        for t in range(0, tokens, TOKENS):
            add_narrow_tile(x.values[t, k:].ctypes.data, x.values.strides[0], panel, depth,
                            to + t * room.offsets.strides[0], room.offsets.strides[0])  # fmt: skip


@compiled
def _depth(inputs, tokens):
    """Rows of a block: whole steps, and blocks of one size as far as there are."""
    most = _FEW_DEPTH if tokens <= FEW else _DEPTH
    blocks, steps = (inputs + most - 1) // most, (inputs + STEP - 1) // STEP
    return (steps + blocks - 1) // blocks * STEP


@compiled
def multiply_integers(matrix, layer, x, inputs, tokens, first, columns, room, part):
    """part[:tokens, :columns] += x times columns from `first` on, but for the columns' scales."""
    group, packed, most = matrix.group, matrix.group != 0, _depth(inputs, tokens)
    tile = most * SIDE + _GAP
    codes, sums, to_step = room.codes.ctypes.data, room.products.ctypes.data, part.strides[0]
    start, stop, low = 0, 0, len(x.parts) // 2
    if packed:
        start, stop = first // group, (first + columns - 1) // group + 1
        for t in range(tokens):
            row = room.offsets[t, : stop - start]
            for g in range(len(row)):
                row[g] = 0
    steps_of_all = (inputs + STEP - 1) // STEP
    for k in range(0, inputs, most):
        row, depth = matrix.addresses[layer] + k * matrix.stride, min(most, inputs - k)
        steps = (depth + STEP - 1) // STEP
        _interleave(matrix, row, depth, first, columns, room.codes, tile)
        if not packed:
            for pair in range(2 * ((columns + CHUNK - 1) // CHUNK)):  # both share a chunk's columns
                to = part.ctypes.data + pair // 2 * CHUNK * 4
                for t in range(0, tokens, SIDE):
                    values = x.parts.ctypes.data + (t // SIDE * steps_of_all + k // STEP) * TILE
                    multiply_codes(values, low, TILE, codes + 2 * pair * tile, tile, steps, sums)
                    settle(matrix.dtype, sums, min(SIDE, tokens - t), x.scales.ctypes.data + 4 * t,
                           np.float32(1), pair % 2, to + t * to_step, to_step)  # fmt: skip
            continue
        _weigh_groups(matrix, row, depth, start, stop, most, room)
        _add_offsets(matrix, row, depth, start, stop, x, k, tokens, room)
        for g in range(stop - start):
            low_column = max((start + g) * group, first) - first
            high_column = min((start + g + 1) * group - first, columns)
            factor = room.largest[g] * np.float32(32768 / 32767)
            for t in range(0, tokens, SIDE):
                rows = min(SIDE, tokens - t)
                words = x.parts.ctypes.data + (t // SIDE * steps_of_all + k // STEP) * 2 * TILE
                scale_tiles(words, room.factors.ctypes.data + 2 * g * most, rows, steps,
                            room.scaled.ctypes.data)  # fmt: skip
                whole = (high_column + CHUNK - 1) // CHUNK * CHUNK
                for column in range(low_column, whole, CHUNK // 2):
                    pair = column // (CHUNK // 2)
                    multiply_codes(room.scaled.ctypes.data, TILE, 2 * TILE,
                                   codes + 2 * pair * tile, tile, steps, sums)  # fmt: skip
                    settle(matrix.dtype, sums, rows, x.scales.ctypes.data + 4 * t, factor, pair % 2,
                           part.ctypes.data + t * to_step + pair // 2 * CHUNK * 4,
                           to_step)  # fmt: skip
    if packed:
        for t in range(tokens):
            for g in range(stop - start):
                low_column = max((start + g) * group, first) - first
                high_column = min((start + g + 1) * group - first, columns)
                row, offset = part[t, low_column:high_column], room.offsets[t, g]
                for i in range(len(row)):
                    row[i] += offset
