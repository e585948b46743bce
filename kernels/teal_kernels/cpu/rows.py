# mypy: allow-untyped-defs
# numba infers the types of what it compiles.
"""The part of the compiled functions that reads weights: surviving rows, added up.

Row-skipping follows TEAL (arXiv 2408.14690, section 4.4), in the form that suits a CPU: one
thread walks its part of the surviving rows, ROWS of them at a time. Floats and integers go the same
way and differ in what a load does; sums of integers are brought to scale when they are complete.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from teal_kernels.cpu.intrinsics import (
    HALF,
    INT4,
    ROWS,
    WIDTH,
    add_rows,
    address_of,
    dot_vectors,
    interleave,
    load,
    prefetch,
    store,
    weigh_rows,
)

# Division as in numpy: Python's, which raises, would keep loops from being vectorised.
compiled = njit(nogil=True, error_model="numpy")


@compiled
def dot(dtype, row, x, size):
    """The product of a row of weights and a float32 vector, both addresses."""
    vectors = size // WIDTH
    total = dot_vectors(dtype, row, x, vectors)
    for i in range(vectors * WIDTH, size):
        total += load(dtype, row, i) * load(np.float32, x, i)
    return total


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
def add_bias(dtype, bias, part):
    """part += the bias at an address, if there is one."""
    if bias != 0:
        for i in range(len(part)):
            part[i] += load(dtype, bias, i)


@compiled
def _compact(x, start, stop, threshold, matrix, layer, rows, factors):
    """List the channels of x[start:stop] with abs(x) > threshold: addresses of rows, and values.

    The list is filled up to whole blocks, and a block to fetch ahead, with a row that counts for
    nothing.
    """
    count, base = 0, matrix.addresses[layer]
    for i in range(start, stop):
        rows[count] = base + i * matrix.stride
        factors[count] = x[i]
        count += abs(x[i]) > threshold
    last = rows[max(count - 1, 0)]
    for i in range(count, (count + ROWS - 1) // ROWS * ROWS + ROWS):
        rows[i] = last
        factors[i] = 0
    return count


@compiled
def _add_columns(dtype, rows, at, factors, start, stop, vectors, to):
    """Add the sum of ROWS factors times columns `start` to `stop` of each row to float32 at `to`.

    Args:
        rows: addresses of 2 * ROWS rows. The second half is fetched while the first is added: no
            hardware prefetcher can guess which rows survive.
        at: byte of a row at which column 0 is.
        factors: float32 [ROWS].
        vectors: how many times WIDTH columns to take at once.
    """
    begin = address_of(dtype, at, start)
    add_rows(dtype, rows.ctypes.data, begin, factors.ctypes.data, factors.strides[0], vectors, to)
    for i in range(vectors * WIDTH, stop - start):
        total = load(np.float32, to, i)
        for k in range(ROWS):
            total += factors[k] * load(dtype, rows[k] + at, start + i)
        store(np.float32, to, i, total)


@compiled
def _vectors(group, first, columns):
    """How many times WIDTH columns from `first` on are taken at once."""
    if group is not None and (group % WIDTH or first % WIDTH):
        return 0  # bytes of INT4 that groups or projections share: one column at a time
    return columns // WIDTH


@compiled
def _add_groups(matrix, group, rows, factors, first, columns, to, scratch):
    """Add the codes of ROWS rows of INT4, times their scales, to `to`; offsets to scratch.sums."""
    groups = (matrix.offsets[-1] + group - 1) // group
    scales, offsets = matrix.stride - 4 * groups, matrix.stride - 2 * groups
    for k in range(ROWS):
        weigh(HALF, rows[k] + scales, 0, factors[k : k + 1], 1, scratch.scaled[k, :groups])
    last = first + columns
    for g in range(first // group, (last + group - 1) // group):
        for k in range(ROWS, 2 * ROWS):
            prefetch(rows[k] + scales + 2 * g)
        start, stop = max(first, g * group), min(last, (g + 1) * group)
        _add_columns(
            INT4, rows, 0, scratch.scaled[:, g], start, stop,
            _vectors(group, first, stop - start), to + (start - first) * 4,
        )  # fmt: skip
    _add_columns(HALF, rows, offsets, factors, 0, groups, groups // WIDTH, scratch.sums.ctypes.data)


@compiled
def _add_block(matrix, group, rows, factors, first, columns, to, scratch):
    """Add ROWS rows, times their factors, to `columns` float32 at `to`."""
    if group is None:
        vectors = columns // WIDTH
        _add_columns(matrix.dtype, rows, 0, factors, first, first + columns, vectors, to)
    else:
        _add_groups(matrix, group, rows, factors, first, columns, to, scratch)


@compiled
def _finish(matrix, group, layer, first, part, scratch):
    """Bring sums of integers, which start at column `first`, to scale and into order."""
    if group is not None:
        for v in range(_vectors(group, first, len(part))):
            interleave(part.ctypes.data + v * WIDTH * 4)
        for i in range(len(part)):
            part[i] += scratch.sums[(first + i) // group]
    elif matrix.scales[layer] != 0:
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
            _add_block(
                matrix, matrix.group, scratch.rows[r : r + 2 * ROWS], scratch.factors[r : r + ROWS],
                offsets[p], len(mine), mine.ctypes.data, scratch,
            )  # fmt: skip
        _finish(matrix, matrix.group, layer, offsets[p], mine, scratch)
        p = q
