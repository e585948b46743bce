# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""The part of the compiled functions that reads weights: surviving rows, added up.

Row-skipping follows TEAL (arXiv 2408.14690, section 4.4), in the form that suits a CPU: one
thread walks its part of the surviving rows, ROWS of them at a time. Floats and integers go the same
way and differ in what a load does; sums of integers are brought to scale when they are complete.
"""

from __future__ import annotations

import numpy as np
from numba import types

from teal_kernels.cpu.fragments import compiled, overloaded
from teal_kernels.cpu.int4 import add_codes, in_order, scale_factors
from teal_kernels.cpu.intrinsics import address_of, load, load_address, prefetch, store
from teal_kernels.cpu.quads import add_bytes, dot_quads, in_quads, split_lines
from teal_kernels.cpu.sums import add_rows, dot_rows, weigh_rows
from teal_kernels.cpu.vectors import AHEAD, BLOCK, DOTS, HALF, INT4, ROWS, WIDTH


@compiled
def dots(dtype, base, stride, x, size, out, room=0):
    """out = the products of rows of `size` weights, `stride` bytes apart, with float32 x.

    base, x: addresses; stride: what a row takes, at least.
    room: address of LINE_BYTES for every LINE of x, with which INT8 is faster; 0 is none.
    """
    columns = 64 // address_of(dtype, 0, 1)
    lines, whole = size // columns, len(out) // DOTS * DOTS
    ahead, to = DOTS * stride * (1 + AHEAD // (DOTS * stride)), out.ctypes.data
    quads = room != 0 and split_lines(dtype, x, lines, room)
    for i in range(0, whole, DOTS):
        if quads:
            dot_quads(base + i * stride, stride, ahead, room, lines, to + 4 * i)
        else:
            dot_rows(dtype, base + i * stride, stride, ahead, x, lines, to + 4 * i)
    for i in range(len(out)):
        if i >= whole:
            out[i] = 0
        for column in range(lines * columns if i < whole else 0, size):
            out[i] += load(dtype, base + i * stride, column) * load(np.float32, x, column)


@compiled
def weigh(dtype, base, stride, factors, count, out):
    """out = the sum of factors[i] times row i of `count` rows, which are `stride` bytes apart."""
    vectors = len(out) // WIDTH
    for v in range(vectors):
        at = address_of(dtype, base, v * WIDTH)
        weigh_rows(dtype, out.ctypes.data + v * WIDTH * 4, at, stride, factors.ctypes.data, count)
    for column in range(vectors * WIDTH, len(out)):
        total = np.float32(0)
        for i in range(count):
            total += factors[i] * load(dtype, base + i * stride, column)
        out[column] = total


@compiled
def add_bias(bias, part, start, stop):
    """part[start:stop] += that of the float32 bias at an address, if there is one."""
    if bias != 0:
        for i in range(start, stop):
            part[i] += load(np.float32, bias, i)


@compiled
def fetch_bias(bias, start, stop):
    """Bring what `add_bias` is to add, if there is a bias, while weights are read.

    The demo model's biases are 0.6 MB: 0.2 ms a token without this, on a Sapphire Rapids.
    """
    if bias != 0:
        for i in range(start, stop, 16):
            prefetch(bias + 4 * i)


@compiled
def _compact(x, start, stop, threshold, matrix, layer, rows, factors):
    """List the channels of x[start:stop] but those with abs(x) <= threshold, so that NaN stays.

    They are listed as addresses of rows, and values, and filled up to whole blocks with a row that
    counts for nothing.
    """
    count, base = 0, matrix.addresses[layer]
    for i in range(start, stop):
        rows[count] = base + i * matrix.stride
        factors[count] = x[i]
        count += not abs(x[i]) <= threshold
    last = rows[max(count - 1, 0)]
    for i in range(count, (count + ROWS - 1) // ROWS * ROWS):
        rows[i] = last
        factors[i] = 0
    return count


@compiled
def _add_integers(layout, rows, ahead, factors, first, columns, to, room):
    """Add ROWS rows of INT4: codes times scales to `to`, offsets to the room's sums."""
    (stride, group, groups), (products, steps, sums) = layout, room
    at, whole = stride - 4 * groups, _in_blocks(group, first, columns)
    scale_factors(rows, ahead, at, factors, groups, products, steps)
    # In between, for the codes have to wait for the last division.
    add_rows(HALF, rows, ahead, at + 2 * groups, factors, groups, sums)
    add_codes(rows, ahead, first, group, groups, products, steps, whole, to)
    for i in range(whole, columns):
        total = load(np.float32, to, i)
        for k in range(ROWS):
            row = load_address(rows, k)
            product = load(np.float32, factors, k) * load(HALF, row + at, (first + i) // group)
            total += product * load(INT4, row, first + i)
        store(np.float32, to, i, total)


@compiled
def _groups(matrix):
    """Groups in a row of INT4, else 0."""
    return (matrix.offsets[-1] + matrix.group - 1) // matrix.group if matrix.group != 0 else 0


@compiled
def _in_blocks(group, first, columns):
    """How many of the columns of INT4 from `first` on are taken in blocks."""
    return 0 if group % BLOCK or first % BLOCK else columns // BLOCK * BLOCK


def _add_block(dtype, layout, rows, ahead, factors, first, columns, to, room):
    """Add ROWS rows, times their factors, from column `first` on, to `columns` float32 at `to`.

    Everything is a number or an address: this is called too often to be handed named tuples.

    layout: stride, group and groups of the matrix.
    rows, ahead: addresses of ROWS addresses of rows. Those ahead are fetched while the first are
        added: no hardware prefetcher can guess which rows survive.
    room: addresses of a thread's products, steps and sums.
    """


@overloaded(_add_block)
def _typed_add_block(dtype, layout, rows, ahead, factors, first, columns, to, room):
    """Choose when numba compiles, so that no dtype compiles what only another needs."""

    def integers(dtype, layout, rows, ahead, factors, first, columns, to, room):
        _add_integers(layout, rows, ahead, factors, first, columns, to, room)

    def whole_bytes(dtype, layout, rows, ahead, factors, first, columns, to, room):
        whole = in_quads(columns)
        add_bytes(rows, ahead, first, factors, whole, to)
        add_rows(dtype, rows, ahead, first + whole, factors, columns - whole, to + 4 * whole)

    def values(dtype, layout, rows, ahead, factors, first, columns, to, room):
        add_rows(dtype, rows, ahead, address_of(dtype, 0, first), factors, columns, to)

    return {types.uint8: integers, types.int8: whole_bytes}.get(dtype.instance_type, values)


@compiled
def _finish(matrix, layer, first, part, scratch):
    """Bring sums of integers, which start at column `first`, into order and to scale."""
    group, last = matrix.group, first + len(part)
    if group != 0:
        in_order(matrix.dtype, part.ctypes.data, _in_blocks(group, first, len(part)))
        for g in range(first // group, (last + group - 1) // group):
            offset = scratch.sums[g]
            for i in range(max(first, g * group) - first, min(last, (g + 1) * group) - first):
                part[i] += offset
    elif matrix.scales[layer] != 0:  # INT8
        in_order(matrix.dtype, part.ctypes.data, in_quads(len(part)))
    if matrix.scales[layer] != 0:
        for i in range(len(part)):
            part[i] *= load(np.float32, matrix.scales[layer], first + i)


@compiled
def project_rows(matrix, layer, x, start, stop, thresholds, part, scratch, kept, team):
    """part = a thread's part of the projections of x, float32 [columns].

    Each projection takes the channels of x[start:stop] above its own threshold, and a thread an
    equal share of those.

    The rows are divided between the threads, not the columns, although the parts then have to be
    summed up: a thread that reads whole rows gets 6 to 16 % more out of the memory (Zen 3).

    Args:
        matrix: of every layer.
        thresholds: float32 [P].
        scratch: has room for the survivors.
        kept: int64 [P], raised by the survivors.
        team: (thread, threads); (0, 1) for all that survive.
    """
    offsets, (thread, threads) = matrix.offsets, team
    layout = (matrix.stride, matrix.group, _groups(matrix))
    rows, factors = scratch.rows.ctypes.data, scratch.factors.ctypes.data
    lead = ROWS * (1 + AHEAD // (ROWS * matrix.stride))
    room = (scratch.products.ctypes.data, scratch.steps.ctypes.data, scratch.sums.ctypes.data)
    p = 0
    while p < len(thresholds):
        q = p + 1  # neighbours with the same threshold are one matrix
        while q < len(thresholds) and thresholds[q] == thresholds[p]:
            q += 1
        count = _compact(
            x, start, stop, thresholds[p], matrix, layer, scratch.rows, scratch.factors
        )
        for i in range(p, q):
            kept[i] += count
        blocks = (count + ROWS - 1) // ROWS
        low, high = blocks * thread // threads * ROWS, blocks * (thread + 1) // threads * ROWS
        mine = part[offsets[p] : offsets[q]]
        for i in range(len(mine)):
            mine[i] = 0
        for i in range(len(scratch.sums)):
            scratch.sums[i] = 0
        for r in range(low, high, ROWS):
            ahead = min(r + lead, high - ROWS)  # another thread's are not for us to fetch
            _add_block(
                matrix.dtype, layout, rows + 8 * r, rows + 8 * ahead, factors + 4 * r,
                offsets[p], len(mine), mine.ctypes.data, room,
            )  # fmt: skip
        _finish(matrix, layer, offsets[p], mine, scratch)
        p = q
