"""The specification itself, against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from projection_cases import DTYPES, SHAPES, SPARSITIES, assert_close, make_case, oracle
from teal_kernels import reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "offsets"), SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_matches_the_sum_written_out(
    inputs: int, offsets: tuple[int, ...], sparsity: float, dtype: torch.dtype
) -> None:
    case = make_case(inputs, offsets, sparsity, dtype)
    y = reference.sparse_project(*case)
    assert y.dtype == dtype
    assert_close(y, oracle(case), case)


def test_float64_is_summed_in_float64() -> None:
    case = make_case(63, (0, 60), 0.5, torch.float64)
    torch.testing.assert_close(
        reference.sparse_project(*case), oracle(case), rtol=1e-14, atol=1e-14
    )


def test_a_channel_equal_to_the_threshold_is_dropped() -> None:
    x, weight = torch.tensor([0.5, -0.5, 0.75]), torch.eye(3)
    y = reference.sparse_project(x, weight, (0, 3), torch.tensor([0.5]))
    assert y.tolist() == [0.0, 0.0, 0.75]


@pytest.mark.parametrize("level", [-math.inf, 0.5, math.inf])
def test_what_is_not_a_number_is_kept(level: float) -> None:
    x, weight = torch.tensor([0.1, math.nan, 0.2]), torch.ones(3, 2)
    assert reference.sparse_project(x, weight, (0, 2), torch.tensor([level])).isnan().all()


def test_the_threshold_is_compared_in_float32() -> None:
    x = torch.tensor([0.1], dtype=torch.float16)  # 0.0999756 in float16
    above = torch.tensor([0.1])  # would round to the same float16 number
    below = torch.tensor([0.0999])
    assert reference.sparse_project(x, torch.ones(1, 1), (0, 1), above).item() == 0
    assert reference.sparse_project(x, torch.ones(1, 1), (0, 1), below).item() > 0


def test_zero_drops_only_zeros_and_minus_infinity_nothing() -> None:
    x, weight = torch.tensor([0.0, 1e-38]), torch.full((2, 1), math.inf)
    assert reference.sparse_project(x, weight, (0, 1), torch.tensor([0.0])).isnan().item()
    kept = torch.tensor([[1.0], [1e38]])
    y = reference.sparse_project(x, kept, (0, 1), torch.tensor([0.0]))
    assert y.item() == pytest.approx(1.0)
    dense = reference.sparse_project(x, kept, (0, 1), torch.tensor([-math.inf]))
    assert dense.item() == pytest.approx(1.0)
