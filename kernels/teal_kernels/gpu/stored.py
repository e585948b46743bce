"""A matrix as kernels read it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from teal_kernels.quantized import QuantizedMatrix

FLOATS = -1  # `Stored.group` of a matrix that is not quantized


class Stored(NamedTuple):
    """The elements of a matrix, and what turns them into weights."""

    elements: Tensor  # floats [K, N], or int32 words [K, N / pack and more]
    grid: Tensor | None  # of int4: scales and offsets of the groups, within the rows
    groups: int  # float16 numbers from a row's scales to its offsets
    scales: Tensor | None  # of integers: [N] float32
    group: int  # columns that share a scale, 0 for int8
    pack: int  # columns in an element

    @classmethod
    def of(cls, weight: Tensor | QuantizedMatrix) -> Stored:
        """A view of the matrix; nothing is copied."""
        if isinstance(weight, Tensor):
            return cls(weight, None, 0, None, FLOATS, 1)
        words = weight.rows.view(torch.int32)
        if not weight.group:
            return cls(words, None, 0, weight.scales, 0, 4)
        grid = weight.rows.view(torch.float16)[:, weight.columns // 4 :]
        return cls(words, grid, weight.groups, weight.scales, weight.group, 8)

    def arguments(self) -> dict[str, Any]:
        """The matrix as every kernel that multiplies one names it."""
        return {
            "w_ptr": self.elements,
            "grid_ptr": self.grid,
            "groups": self.groups,
            "w_scales_ptr": self.scales,
            "STRIDE_K": self.elements.stride(0),
            "GROUP": self.group,
        }
