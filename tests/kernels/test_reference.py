"""The specification itself, against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from projection_cases import DTYPES, SHAPES, SPARSITIES, assert_close, make_case, oracle
from teal_kernels import reference
from teal_kernels.quantized import QuantizedMatrix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "offsets"), SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_matches_the_sum_written_out(
    inputs: int, offsets: tuple[int, ...], sparsity: float, dtype: torch.dtype
) -> None:
    case = make_case(inputs, offsets, sparsity, dtype)
    bias = torch.randn(offsets[-1]).to(dtype)
    y = reference.sparse_project(*case, bias)
    assert y.dtype == dtype
    assert_close(y, oracle(case, bias), case)


@pytest.mark.parametrize("group", [0, 64], ids=["int8", "int4"])
def test_quantized_is_the_product_with_the_dequantized(group: int) -> None:
    case = make_case(33, (0, 40, 104), 0.5, torch.float32)
    weight = (
        QuantizedMatrix.int4(case.weight, group) if group else QuantizedMatrix.int8(case.weight)
    )
    wide = case._replace(weight=weight.dequantize())
    assert_close(reference.sparse_project(*case._replace(weight=weight)), oracle(wide), wide)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5)}, r"x must be \[4\]"),
        ({"x": torch.zeros(2, 2)}, r"x must be \[4\]"),
        ({"x": torch.zeros(4, dtype=torch.int64)}, "x must be floating point"),
        ({"weight": torch.zeros(6, 4).t()}, "contiguous rows"),
        ({"weight": torch.zeros(4)}, "contiguous rows"),
        ({"offsets": (0, 3)}, "offsets must rise from 0 to 6"),
        ({"offsets": (0, 7, 6), "thresholds": torch.zeros(2)}, "offsets must rise"),
        ({"thresholds": torch.zeros(2)}, r"thresholds must be \[1\]"),
        ({"thresholds": torch.zeros(1, dtype=torch.float16)}, "thresholds must be float32"),
        ({"bias": torch.zeros(5)}, r"bias must be \[6\]"),
        ({"thresholds": torch.zeros(1, device="meta")}, "one device"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    good = {
        "x": torch.zeros(4),
        "weight": torch.zeros(4, 6),
        "offsets": (0, 6),
        "thresholds": torch.zeros(1),
    }
    with pytest.raises(ValueError, match=message):
        reference.sparse_project(**(good | change))
