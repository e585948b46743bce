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
    UPPER,
    interleave,
    multiply_codes,
    place_of,
    settle,
)
from teal_kernels.cpu.fixed import largest_of, largest_scales, scale_tiles, to_fixed, unpack_scales
from teal_kernels.cpu.fragments import compiled
from teal_kernels.cpu.intrinsics import address_of, load, prefetch
from teal_kernels.cpu.tiles import FEW, NARROW, TOKENS, add_narrow_tile

# The most rows of a block, by the number of tokens, and columns that are interleaved at a time: for
# up to FEW they stay in the first-level cache, for more what a tile is multiplied with does.
_FEW_DEPTH, _DEPTH, _SPAN = 128, 768, 128
_FEW_BYTES = 2**17  # of such a block; where rows are longer it is one step
WIDTH = 512  # columns of a matrix that more tokens take, at most
_GAP = 64  # bytes between tiles: a line, which keeps them off each other's sets of the cache
SCALED = 2 * _DEPTH * SIDE  # room for a tile of inputs times a group's scales

_place_of = compiled(place_of)


def room_for(group, columns):
    """Room that a matrix needs: bytes of codes, groups, and numbers of groups and rows."""
    if group % CHUNK:
        return 0, 0, 0
    few, many = (-(-size // max(group, CHUNK)) + NARROW for size in (columns, WIDTH + CHUNK))
    rows = max(group, _SPAN) // SIDE * (_DEPTH * SIDE + _GAP)
    return rows, max(few, many), max(_FEW_DEPTH * few, _DEPTH * many)


@compiled
def fits(matrix, first):
    """Whether the columns of each chunk from a column on are of one group."""
    return matrix.group % CHUNK == 0 and first % CHUNK == 0


@compiled
def prepare(dtype, words, x, token, start, inputs):
    """Turn a token's `inputs` values from `start` on to fixed-point numbers, zeros behind them.

    dtype, words: INT8 and 1, or INT4 and 2.
    """
    values = x.values[token, start:].ctypes.data
    largest = largest_of(values, inputs)
    each = np.float32(32767) / largest if largest != 0 else np.float32(0)
    x.scales[token] = largest / np.float32(32767)
    steps, low = (inputs + STEP - 1) // STEP, len(x.parts) // 2
    at = (token // SIDE * steps * SIDE + token % SIDE) * STEP * words
    to_fixed(dtype, values, each, steps, x.parts.ctypes.data + at, low)
    first = at + (steps - 1) * TILE * words  # of the last step
    for i in range(first + (inputs - (steps - 1) * STEP) * words, first + STEP * words):
        x.parts[i] = 0
        if words == 1:
            x.parts[low + i] = 0


@compiled
def _interleave(matrix, row, depth, first, columns, codes, tile):
    """`depth` rows from the one at an address on, columns first to first + columns, to tiles.

    What is in the tiles beyond `depth` is multiplied with zeros.
    """
    packed, whole, fours = matrix.group != 0, columns // CHUNK, depth // 4
    interleave(matrix.dtype, row, matrix.stride, fours, first, whole, codes.ctypes.data, tile)
    for k in range(depth):
        done = whole * CHUNK if k < 4 * fours else 0
        for column in range(done, columns):
            part, place = _place_of(packed, column % CHUNK)
            at = (column // CHUNK * 4 + part) * tile + k // 4 * 64 + place * 4 + k % 4
            code = load(matrix.dtype, row + k * matrix.stride, first + column)
            codes[at] = np.int8((code - CENTRE) * UPPER if packed else code)


@compiled
def _fetch(address, stride, start, stop, size):
    """Bring `size` bytes of each of the rows start to stop from the one at an address on."""
    for k in range(start, stop):
        for line in range(0, size + 63, 64):
            prefetch(address + k * stride + line)


@compiled
def _weigh_groups(matrix, row, depth, first, count, most, room):
    """The scales of `count` groups in `depth` rows: in fixed point, and for CENTRE.

    most: rows of a block; those of the next one are fetched.
    """
    groups, stride = (matrix.offsets[-1] + matrix.group - 1) // matrix.group, matrix.stride
    scales, whole = row + stride - 4 * groups + 2 * first, (count + NARROW - 1) // NARROW * NARROW
    largest, each = room.largest[:whole], room.each[:whole]
    largest_scales(scales, stride, depth, count, largest.ctypes.data)
    for g in range(len(largest)):
        each[g] = np.float32(32767) / largest[g] if largest[g] != 0 else np.float32(0)
    unpack_scales(scales, scales + 2 * groups, stride, depth, count, most * stride,
                  each.ctypes.data, most, room.factors.ctypes.data,
                  room.centres.ctypes.data)  # fmt: skip


@compiled
def _add_offsets(depth, groups, x, start, tokens, most, room, step):
    """room.offsets += inputs from `start` on times what CENTRE stands for; `step` a token."""
    for p in range(0, groups, NARROW):
        panel, to = room.centres[p * most :].ctypes.data, room.offsets[p:].ctypes.data
        for t in range(0, tokens, TOKENS):
            add_narrow_tile(x.values[t, start:].ctypes.data, x.values.strides[0], panel, depth,
                            to + 4 * t * step, 4 * step)  # fmt: skip


@compiled
def _depth(inputs, tokens, stride):
    """Rows of a block: whole steps, and blocks of one size as far as there are."""
    most = _DEPTH
    if tokens <= FEW:  # this block and the next one are in the second-level cache
        most = _FEW_DEPTH if _FEW_DEPTH * stride <= _FEW_BYTES else STEP
    blocks, steps = (inputs + most - 1) // most, (inputs + STEP - 1) // STEP
    return (steps + blocks - 1) // blocks * STEP


@compiled
def multiply_integers(matrix, layer, x, start, stop, tokens, first, columns, room, part):
    """part[:tokens, :columns] += x times rows start to stop and columns from `first` on.

    Scales of columns are left out. x is prepared from `start` on.
    """
    group, packed, last = matrix.group, matrix.group != 0, first + columns
    most, span = _depth(stop - start, tokens, matrix.stride), max(group, _SPAN)
    tile, to, to_step = most * SIDE + _GAP, part.ctypes.data, part.strides[0]
    codes, sums, begin, groups, step = room.codes.ctypes.data, room.products.ctypes.data, 0, 0, 0
    origin = first
    if packed:
        begin = first // group
        origin = begin * group
        groups = (last - 1) // group + 1 - begin
        step = (groups + NARROW - 1) // NARROW * NARROW
        for i in range((tokens + TOKENS - 1) // TOKENS * TOKENS * step):
            room.offsets[i] = 0
    all_steps, words, halves = (
        (stop - start + STEP - 1) // STEP,
        1 + packed,
        2 * ((columns + CHUNK - 1) // CHUNK),
    )
    # Bytes of a row that are fetched: the scales are among them where all columns are.
    stride, size = matrix.stride, address_of(matrix.dtype, 0, columns)
    if columns == matrix.offsets[-1]:
        size = stride
    for k in range(start, stop, most):
        row, depth = matrix.addresses[layer] + k * matrix.stride, min(most, stop - k)
        steps, next_depth = (depth + STEP - 1) // STEP, min(most, stop - k - most)
        piece = address_of(matrix.dtype, row, first)
        if k == start and tokens <= FEW:
            _fetch(piece, stride, 0, depth, size)
        if packed:
            _weigh_groups(matrix, row, depth, begin, groups, most, room)
            _add_offsets(depth, groups, x, k, tokens, most, room, step)
        for column in range(origin, last, span):
            at, end = max(column, first) - first, min(column + span, last) - first
            _interleave(matrix, row, depth, first + at, end - at, room.codes, tile)
            for own in range(column, min(column + span, last), group if packed else span):
                left, right = max(own, first) - first, min(own + group, last) - first
                factor, factors = np.float32(1), room.factors.ctypes.data
                if packed:
                    g = own // group - begin
                    factor = room.largest[g] * np.float32(32768 / 32767 / UPPER)
                    factors += 2 * g * most
                else:
                    left, right = at, end
                for t in range(0, tokens, SIDE):
                    rows, place = min(SIDE, tokens - t), t // SIDE * all_steps + (k - start) // STEP
                    values, below = x.parts.ctypes.data + place * TILE * words, len(x.parts) // 2
                    if packed:
                        scale_tiles(values, factors, rows, steps, room.scaled.ctypes.data)
                        values, below = room.scaled.ctypes.data, TILE
                    for half in range(2 * (left // CHUNK), 2 * ((right + CHUNK - 1) // CHUNK)):
                        if t == 0 and next_depth > 0:  # row by row, as memory likes it
                            done = half * next_depth // halves
                            next_done = (half + 1) * next_depth // halves
                            _fetch(piece + most * stride, stride, done, next_done, size)
                        tiles = codes + 2 * (half - at // CHUNK * 2) * tile
                        multiply_codes(values, below, TILE * words, tiles, tile, steps, sums)
                        settle(matrix.dtype, sums, rows, x.scales.ctypes.data + 4 * t, factor,
                               half % 2, to + t * to_step + half // 2 * CHUNK * 4,
                               to_step)  # fmt: skip
    for t in range(tokens if packed else 0):
        for g in range(groups):
            left = max((begin + g) * group, first) - first
            right = min((begin + g + 1) * group, last) - first
            row, offset = part[t, left:right], room.offsets[t * step + g]
            for i in range(len(row)):
                row[i] += offset
