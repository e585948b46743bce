"""Inputs for tests of the sparse projection: the specification's and the CPU's."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

DTYPES = [
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float32, id="fp32"),
]

# (K, column bounds): sizes of one, odd ones, ones off every block, three and two fused blocks.
SHAPES = [
    pytest.param(1, (0, 1), id="1x1"),
    pytest.param(1, (0, 7), id="1x7"),
    pytest.param(63, (0, 1), id="63x1"),
    pytest.param(63, (0, 60), id="63x60"),
    pytest.param(16, (0, 64), id="16x64"),
    pytest.param(33, (0, 40, 48, 56), id="33x(40+8+8)"),
    pytest.param(65, (0, 31, 62), id="65x(31+31)"),
    pytest.param(50, (0, 17, 17, 530), id="50x(17+0+513)"),
]

SPARSITIES = [0.0, 0.5, 0.9]


class Case(NamedTuple):
    """Arguments of sparse_project."""

    x: Tensor
    weight: Tensor
    offsets: tuple[int, ...]
    thresholds: Tensor


def make_case(
    inputs: int,
    offsets: tuple[int, ...],
    sparsity: float,
    dtype: torch.dtype,
    seed: int = 0,
) -> Case:
    """Random inputs; block p is thresholded a little above `sparsity`, each block differently."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inputs, generator=generator).to(dtype)
    weight = torch.randn(inputs, offsets[-1], generator=generator).to(dtype)
    levels = [min(sparsity + 0.03 * p, 1.0) for p in range(len(offsets) - 1)]
    thresholds = torch.quantile(x.float().abs(), torch.tensor(levels))
    if sparsity == 0:
        thresholds.fill_(0)
    return Case(x, weight, offsets, thresholds)


def oracle(case: Case) -> Tensor:
    """The projection in float64, written out channel by channel."""
    x, weight, thresholds = case.x.double(), case.weight.double(), case.thresholds
    y = torch.zeros(weight.shape[1], dtype=torch.float64)
    for p, (start, end) in enumerate(pairwise(case.offsets)):
        for i in (case.x.float().abs() > thresholds[p]).nonzero()[:, 0].tolist():
            y[start:end] += x[i] * weight[i, start:end]
    return y


def assert_close(y: Tensor, expected: Tensor, case: Case) -> None:
    """Within the rounding of a float32 sum of K products and of one cast to y's dtype."""
    size = case.x.double().abs() @ case.weight.double().abs()
    summed = torch.finfo(torch.float32).eps * (case.x.shape[0] ** 0.5 + 2) * size
    cast = torch.finfo(y.dtype).eps * expected.abs()
    error = (y.double() - expected).abs()
    assert bool((error <= summed + cast).all()), (
        f"off by {float((error - summed - cast).max()):.3g}"
    )
