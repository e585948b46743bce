"""The projections of the CPU's step, on their own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from projection_cases import DTYPES, SHAPES, SPARSITIES, Case, assert_close, make_case, oracle
from teal_kernels.cpu import Projection, team
from teal_kernels.quantized import QuantizedMatrix

# Around the vector's width of 32, whole vectors on each of several threads, a real size.
WIDE = [
    pytest.param(5, (0, 31), id="5x31"),
    pytest.param(4, (0, 32), id="4x32"),
    pytest.param(9, (0, 33), id="9x33"),
    pytest.param(100, (0, 111, 222, 333), id="100x(111+111+111)"),
    pytest.param(576, (0, 576, 768, 960), id="576x(576+192+192)"),
]


@pytest.fixture(params=[1, 2, 3], ids="threads-{}".format)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(team, "default_threads", lambda: request.param)
    return int(request.param)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN."""

    def poisoned(shape: Any, dtype: Any = float) -> Any:
        return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 0, dtype=dtype)

    monkeypatch.setattr(np, "empty", poisoned)


def sparse_project(
    x: torch.Tensor, weight: Any, offsets: tuple[int, ...], thresholds: torch.Tensor
) -> torch.Tensor:
    """The second of two layers, which differ."""
    other = make_case(weight.shape[0], (0, weight.shape[1]), 0, torch.float32, seed=9).weight
    if isinstance(weight, QuantizedMatrix):
        first: Any = quantize(other, weight.group)
    else:
        first = other.to(weight.dtype)
    widths = [end - start for start, end in pairwise(offsets)]
    return Projection([first, weight], widths)(1, x.float(), thresholds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "offsets"), SHAPES + WIDE)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sparse_project(
    inputs: int, offsets: tuple[int, ...], sparsity: float, dtype: torch.dtype, threads: int
) -> None:
    case = make_case(inputs, offsets, sparsity, dtype)
    case = case._replace(x=case.x.float())
    assert_close(sparse_project(*case), oracle(case), case)


def test_each_of_several_inputs_has_its_own_survivors(threads: int) -> None:
    cases = [make_case(63, (0, 40, 48, 56), 0.5, torch.float32, seed=n) for n in range(4)]
    first = cases[0]
    x = torch.stack([case.x for case in cases]).view(2, 2, 63)
    projection = Projection([first.weight], [40, 8, 8])
    y = projection(0, x, first.thresholds)
    assert y.shape == (2, 2, 56)
    for case, row in zip(cases, y.view(4, 56), strict=True):
        own = first._replace(x=case.x)
        assert_close(row, oracle(own), own)
    assert projection(0, x[:0], first.thresholds).shape == (0, 2, 56)


def test_blocks_with_equal_thresholds_are_one_matrix(threads: int) -> None:
    case = make_case(63, (0, 40, 48, 56), 0.5, torch.float16)
    equal = case._replace(thresholds=case.thresholds[:1].expand(3))
    mixed = case._replace(thresholds=case.thresholds[[0, 0, 2]])
    assert_close(sparse_project(*equal), oracle(equal), equal)
    assert_close(sparse_project(*mixed), oracle(mixed), mixed)


def test_nothing_and_everything_dropped(threads: int) -> None:
    case = make_case(63, (0, 60), 0.5, torch.float16)
    everything = case._replace(thresholds=case.x.float().abs().max().reshape(1))
    assert not sparse_project(*everything).any()
    nothing = case._replace(thresholds=torch.full((1,), -torch.inf))
    assert_close(sparse_project(*nothing), oracle(nothing), nothing)


def test_ties_are_dropped() -> None:
    x = torch.tensor([0.5, -0.5, 0.75, -0.25])
    y = sparse_project(x, torch.eye(4).half(), (0, 4), torch.tensor([0.5]))
    assert y.tolist() == [0.0, 0.0, 0.75, 0.0]


def test_dropped_rows_are_never_used(threads: int) -> None:
    case = make_case(40, (0, 24, 48), 0.5, torch.float16)
    dropped = case.x.float().abs() <= case.thresholds.min()
    case.weight[dropped] = torch.nan
    expected = oracle(case)
    assert not expected.isnan().any()
    finite = case._replace(weight=case.weight.nan_to_num())
    assert_close(sparse_project(*case), expected, finite)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_odd_addresses(dtype: torch.dtype) -> None:
    plain = make_case(33, (0, 40), 0.5, dtype)
    x = torch.full((33, 3), torch.nan, dtype=dtype)
    x[:, 1] = plain.x
    thresholds = torch.full((1, 2), torch.nan)
    thresholds[:, 0] = plain.thresholds
    storage = bytearray(33 * 40 * plain.weight.itemsize + 1)
    odd = torch.frombuffer(storage, dtype=dtype, offset=1, count=33 * 40).view(33, 40)
    odd.copy_(plain.weight)
    assert odd.data_ptr() % 2 != torch.frombuffer(storage, dtype=torch.uint8).data_ptr() % 2
    case = Case(x[:, 1], odd, plain.offsets, thresholds[:, 0])
    assert_close(sparse_project(*case), oracle(plain), plain)


# Columns: less than a block of 64, whole blocks, every rest of one that a matrix may have, blocks
# that start within a group or off a block, as many groups as vectors of 8 and of 32 hold and more.
QUANTIZED = [
    pytest.param(1, (0, 8), id="1x8"),
    pytest.param(7, (0, 64), id="7x64"),
    pytest.param(9, (0, 128), id="9x128"),
    *(pytest.param(17, (0, 64 + rest), id=f"17x{64 + rest}") for rest in range(8, 64, 8)),
    pytest.param(33, (0, 64, 192, 320), id="33x(64+128+128)"),
    pytest.param(40, (0, 17, 17, 200), id="40x(17+0+183)"),
    pytest.param(31, (0, 72, 144), id="31x(72+72)"),
    pytest.param(64, (0, 576, 768, 960), id="64x(576+192+192)"),
    pytest.param(12, (0, 2560), id="12x2560"),
]


def quantize(weight: torch.Tensor, group: int) -> QuantizedMatrix:
    return QuantizedMatrix.int4(weight, group) if group else QuantizedMatrix.int8(weight)


def assert_close_quantized(y: torch.Tensor, expected: torch.Tensor, case: Any) -> None:
    """Within a float32 sum's rounding, and that of x, or its products with scales, to 16 bits."""
    x, weight = case.x.double().abs(), case.weight
    wide = weight.dequantize().double().abs()
    bound = torch.finfo(torch.float32).eps * (len(x) ** 0.5 + 2) * (x @ wide)
    if weight.group:
        steps, offsets = (
            weight.rows[:, weight.columns // 2 :].contiguous().view(torch.float16).double()
        ).chunk(2, dim=1)
        group = torch.arange(weight.columns) // weight.group
        products = (x[:, None] * steps)[:, group] * weight.scales
        # Codes and offsets are summed apart: their sizes count, not that of the weights.
        size = products.sum(0) * 15 + (x @ offsets.abs())[group] * weight.scales
        bound += torch.finfo(torch.float32).eps * (len(x) ** 0.5 + 2) * size
        bound += products.amax(0) * 15 * 2**-16 * len(x)
    else:
        bound += x.amax() / (2 * 127 * 256) * wide.sum(0)
    error = (y.double() - expected).abs()
    assert bool((error <= bound).all()), f"off by {float((error - bound).max()):.3g}"


@pytest.mark.parametrize(
    "group", [0, 64, 128, 192, 8], ids=["int8", *map("int4-{}".format, (64, 128, 192, 8))]
)
@pytest.mark.parametrize(("inputs", "offsets"), QUANTIZED)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_quantized(
    inputs: int, offsets: tuple[int, ...], sparsity: float, group: int, threads: int
) -> None:
    case = make_case(inputs, offsets, sparsity, torch.float32)
    matrix = quantize(case.weight * torch.logspace(0, 2, offsets[-1]), group)
    wide = case._replace(weight=matrix.dequantize())
    quantized = case._replace(weight=matrix)
    assert_close_quantized(sparse_project(*quantized), oracle(wide), quantized)


@pytest.mark.parametrize("group", [0, 64], ids=["int8", "int4"])
def test_quantized_nothing_and_everything_dropped(group: int, threads: int) -> None:
    case = make_case(63, (0, 128), 0.5, torch.float32)
    quantized = case._replace(weight=quantize(case.weight, group))
    everything = quantized._replace(thresholds=case.x.abs().max().reshape(1))
    assert not sparse_project(*everything).any()
    nothing = quantized._replace(thresholds=torch.full((1,), -torch.inf))
    wide = nothing._replace(weight=nothing.weight.dequantize())
    assert_close_quantized(sparse_project(*nothing), oracle(wide), nothing)


def test_int4_is_close_where_channels_differ_by_orders_of_magnitude() -> None:
    """16 bits count from the largest product of eight rows: the others lose no more than that."""
    case = make_case(64, (0, 256), 0.0, torch.float32)
    case.x[::5] *= 1000
    quantized = case._replace(weight=quantize(case.weight, 64))
    expected = oracle(case._replace(weight=quantized.weight.dequantize()))
    y = sparse_project(*quantized)
    assert_close_quantized(y, expected, quantized)
    assert float((y - expected).norm() / expected.norm()) < 1e-4


def test_int4_of_zeros_and_extremes() -> None:
    case = make_case(16, (0, 64), 0.0, torch.float32)
    weight = torch.zeros(16, 64)
    weight[3] = 60000.0
    weight[4, :32] = -1e-6
    quantized = case._replace(weight=quantize(weight, 64))
    expected = oracle(case._replace(weight=quantized.weight.dequantize()))
    assert_close_quantized(sparse_project(*quantized), expected, quantized)
