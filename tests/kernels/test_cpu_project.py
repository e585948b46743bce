"""The CPU's sparse projection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from projection_cases import DTYPES, SHAPES, SPARSITIES, Case, assert_close, make_case, oracle
from teal_kernels.cpu import sparse_project, team

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "offsets"), SHAPES + WIDE)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sparse_project(
    inputs: int, offsets: tuple[int, ...], sparsity: float, dtype: torch.dtype, threads: int
) -> None:
    case = make_case(inputs, offsets, sparsity, dtype)
    case = case._replace(x=case.x.float())
    bias = torch.randn(offsets[-1]).to(dtype)
    assert_close(sparse_project(*case), oracle(case), case)
    assert_close(sparse_project(*case, bias), oracle(case, bias), case)


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
    columns = torch.full((33, 57), torch.nan, dtype=dtype)
    columns[:, 5:45] = plain.weight
    storage = bytearray(33 * 40 * plain.weight.itemsize + 1)
    odd = torch.frombuffer(storage, dtype=dtype, offset=1, count=33 * 40).view(33, 40)
    odd.copy_(plain.weight)
    assert odd.data_ptr() % 2 != torch.frombuffer(storage, dtype=torch.uint8).data_ptr() % 2
    for weight in (columns[:, 5:45], odd):
        case = Case(x[:, 1], weight, plain.offsets, thresholds[:, 0])
        assert_close(sparse_project(*case), oracle(plain), plain)


def test_bad_arguments_are_named() -> None:
    case = make_case(4, (0, 4), 0.5, torch.float32)
    with pytest.raises(ValueError, match="weight must be 16- or 32-bit"):
        sparse_project(*case._replace(weight=case.weight.double()))
    with pytest.raises(ValueError, match="x must be"):
        sparse_project(*case._replace(x=case.x[:3]))
