"""Matrices of 8- and 4-bit integers in the layout that sparse decoding reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of floats that `QuantizedMatrix.multiply` makes at a time. For a short prompt the host takes
# longer to launch a GPU's products than the GPU to run them, which asks for few and large ones.
_TILE_BYTES = {"cpu": 64 << 20, "cuda": 128 << 20}
_ROWS = 1024  # that are rounded at a time: rounding holds a few float32 copies of them


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A [K, N] matrix of integers, one input channel being one contiguous row.

    A column has a float32 scale, which multiplies what its rows hold.

    int8: rows [K, N] int8, and w[k, n] = rows[k, n] * scales[n].

    int4: rows [K, N / 2 + 4 * groups] uint8, where groups = ceil(N / group). A row holds its codes,
    two a byte with the even column in the low half, then a float16 scale for each group of columns,
    then a float16 offset for each, and w[k, n] = (code * scale + offset) * scales[n]. A row that is
    skipped skips its groups' scales as well.

    Raises:
        ValueError: shapes or dtypes are not as above, N is no multiple of 8, or the group is odd.
    """

    rows: Tensor
    scales: Tensor  # [N] float32
    columns: int  # N
    group: int  # columns of an int4 row that share scale and offset; 0 is int8

    def __post_init__(self) -> None:
        if self.columns % 8:
            raise ValueError(f"quantized matrices need a multiple of 8 columns, got {self.columns}")
        if self.group % 2:
            raise ValueError(f"two codes share a byte: a group of {self.group} is odd")
        groups = self.groups
        width = self.columns // 2 + 4 * groups if groups else self.columns
        expected = torch.uint8 if groups else torch.int8
        if self.rows.ndim != 2 or self.rows.shape[1] != width or self.rows.dtype != expected:
            raise ValueError(
                f"rows must be [inputs, {width}] {expected}, "
                f"got {tuple(self.rows.shape)} {self.rows.dtype}"
            )
        if tuple(self.scales.shape) != (self.columns,) or self.scales.dtype != torch.float32:
            raise ValueError(
                f"scales must be [{self.columns}] float32, "
                f"got {tuple(self.scales.shape)} {self.scales.dtype}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs K and outputs N."""
        return self.rows.shape[0], self.columns

    @property
    def bits(self) -> int:
        """Of a weight: 8 or 4."""
        return 4 if self.group else 8

    @property
    def groups(self) -> int:
        """Groups in a row; 0 for int8."""
        return -(-self.columns // self.group) if self.group else 0

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    @property
    def nbytes(self) -> int:
        """Bytes of rows and scales."""
        return self.rows.nbytes + self.scales.nbytes

    def to(self, device: str | torch.device) -> QuantizedMatrix:
        """The same matrix on another device."""
        return QuantizedMatrix(
            self.rows.to(device), self.scales.to(device), self.columns, self.group
        )

    @classmethod
    def int8(cls, weight: Tensor) -> QuantizedMatrix:
        """Round weight [K, N] to the nearest of 255 levels, with one scale a column."""
        codes, scales = _int8_codes(weight, dim=0)
        return cls(codes, scales, weight.shape[1], 0)

    @classmethod
    def int4(cls, weight: Tensor, group: int) -> QuantizedMatrix:
        """Round weight [K, N] to the nearest of 16 levels between a group's extremes.

        Columns are brought to one size first.
        """
        columns, parts = column_sizes(weight), []
        divisor = torch.where(columns > 0, columns, 1)
        for rows in weight.split(_ROWS):
            even = rows / divisor
            steps, offsets = int4_grid(even, group)
            parts.append(int4_rows(int4_codes(even, steps, offsets, group), steps, offsets))
        return cls(torch.cat(parts), columns, weight.shape[1], group)

    def dequantize(
        self, start: int = 0, end: int | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Columns start to end as floats, [K, end - start]; computed in float32."""
        end = self.columns if end is None else end
        if (kernel := _kernel(self.device.type)) is not None:
            grid = {"group": self.group, "groups": self.groups}
            return kernel(self.rows, self.scales, start, end, dtype, **grid)
        if not self.group:
            return self.rows[:, start:end].float().mul_(self.scales[start:end]).to(dtype)
        group, first, last = self.group, start // self.group, -(-end // self.group)
        pairs = self.rows[:, first * group // 2 : min(last * group, self.columns) // 2]
        # In whole groups, of which the last may lie partly beyond the columns.
        floats = self.rows.new_empty(len(pairs), (last - first) * group // 2, 2, dtype=torch.float)
        floats[:, : pairs.shape[1], 0] = pairs & 15
        floats[:, : pairs.shape[1], 1] = pairs >> 4
        grouped = floats.view(len(pairs), last - first, group)
        # A slice's rows are too far apart to be seen as halves.
        grids = self.rows[:, self.columns // 2 :].contiguous().view(torch.float16)
        steps, offsets = grids.float()[:, :, None].chunk(2, dim=1)
        grouped.mul_(steps[:, first:last]).add_(offsets[:, first:last])
        asked = grouped.flatten(1)[:, start - first * group : end - first * group]
        return asked.mul_(self.scales[start:end]).to(dtype)

    def multiply(self, x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """x [T, K] → its product with columns start to end, in the dtype of x.

        It never holds more than a tile of floats, and so has no gradient.
        """
        end = self.columns if end is None else end
        y = x.new_empty(x.shape[0], end - start)
        most = _TILE_BYTES[x.device.type] // max(1, len(self.rows) * x.element_size())
        step = max(64, most // 64 * 64)
        for first in range(start, end, step):
            last = min(first + step, end)
            tile = self.dequantize(first, last, dtype=x.dtype)
            torch.matmul(x, tile, out=y[:, first - start : last - start])
        return y


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """An lm_head [V, H] of int8 with a scale a row: w[v, h] = rows[v, h] * scales[v].

    Raises:
        ValueError: rows are not [V, H] int8, or scales not [V].
    """

    rows: Tensor
    scales: Tensor  # float32

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.dtype != torch.int8:
            raise ValueError(f"rows must be [V, H] int8, got {self.rows.shape} {self.rows.dtype}")
        if tuple(self.scales.shape) != (self.rows.shape[0],):
            raise ValueError(f"scales must be [{self.rows.shape[0]}], got {self.scales.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """Vocabulary V and hidden size H."""
        return self.rows.shape[0], self.rows.shape[1]

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 8

    @property
    def nbytes(self) -> int:
        """Bytes of rows and scales."""
        return self.rows.nbytes + self.scales.nbytes

    def to(self, device: str | torch.device) -> QuantizedRows:
        """The same matrix on another device."""
        return QuantizedRows(self.rows.to(device), self.scales.to(device))

    @classmethod
    def int8(cls, weight: Tensor) -> QuantizedRows:
        """Round weight [V, H] to the nearest of 255 levels, with one scale a row."""
        parts = [_int8_codes(rows, dim=1) for rows in weight.split(_ROWS)]
        codes, scales = zip(*parts, strict=True)
        return cls(torch.cat(codes), torch.cat(scales))

    def dequantize(
        self, start: int = 0, end: int | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Rows start to end as floats, [end - start, H]."""
        end = self.rows.shape[0] if end is None else min(end, self.rows.shape[0])
        codes, scales = self.rows[start:end], self.scales[start:end]
        if (kernel := _kernel(codes.device.type)) is not None:
            return kernel(codes, scales, 0, codes.shape[1], dtype, by_row=True)
        return (codes.float() * scales[:, None]).to(dtype)


@cache
def _kernel(device_type: str) -> Callable[..., Tensor] | None:
    """What dequantizes on a GPU in one pass; None where torch's operations have to."""
    if device_type != "cuda":
        return None
    try:
        from teal_kernels.dequantize import dequantize
    except Exception:  # a broken Triton fails in any way it likes
        return None
    return dequantize


def column_sizes(weight: Tensor) -> Tensor:
    """The root mean square of each column of weight [K, N], float32 [N].

    0 of a column of zeros only: squares are of shares of its largest weight, so that none of them
    leaves the range of float32.
    """
    largest = weight.abs().amax(0).float()
    divisor = torch.where(largest > 0, largest, 1)
    squares = torch.zeros_like(largest)
    for rows in weight.split(_ROWS):
        squares += (rows / divisor).square_().sum(0)
    return largest * (squares / len(weight)).sqrt()


def int4_rows(codes: Tensor, steps: Tensor, offsets: Tensor) -> Tensor:
    """Rows as `QuantizedMatrix` has them.

    Args:
        codes: [K, N] uint8.
        steps: scales of the groups, [K, groups] float16.
        offsets: the same shape and dtype.
    """
    halves = codes[:, 0::2] | (codes[:, 1::2] << 4)
    grids = (part.contiguous().view(torch.uint8) for part in (steps, offsets))
    return torch.cat((halves, *grids), dim=1)


def int4_grid(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scale and offset (what code 0 stands for) of each group, so that 0 … 15 span its extremes.

    weight [K, N] → two of [K, ceil(N / group)] float16.
    """
    short = -weight.shape[1] % group
    # The last group is filled up with its own last column.
    filled = F.pad(weight.float()[:, None], (0, short), mode="replicate")[:, 0]
    low, high = filled.unflatten(1, (-1, group)).aminmax(dim=2)
    offsets = low.half()
    scales = ((high - offsets.float()) / 15).half()
    return scales, offsets


def int4_codes(weight: Tensor, scales: Tensor, offsets: Tensor, group: int) -> Tensor:
    """The nearest codes on a grid of `int4_grid`: [K, N] uint8."""
    columns = weight.shape[1]
    step = scales.float().repeat_interleave(group, 1)[:, :columns]
    low = offsets.float().repeat_interleave(group, 1)[:, :columns]
    divisor = torch.where(step > 0, step, 1)
    return ((weight.float() - low) / divisor).round_().clamp_(0, 15).to(torch.uint8)


def _int8_codes(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Codes like weight, and float32 scales that each cover one slice along `dim`."""
    wide = weight.float()
    scales = wide.abs().amax(dim) / 127
    divisor = torch.where(scales > 0, scales, 1).unsqueeze(dim)
    return (wide / divisor).round_().clamp_(-127, 127).to(torch.int8), scales
