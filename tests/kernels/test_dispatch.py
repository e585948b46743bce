"""The choice between the forms of an op."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from projection_cases import assert_close, make_case, oracle
from teal_kernels import available_backends, dispatch, sparse_project
from teal_kernels.quantized import QuantizedMatrix


@pytest.fixture(autouse=True)
def _look_up_anew() -> Iterator[None]:
    """No test sees, or leaves behind, a choice that another made."""
    for cached in (dispatch._fastest, dispatch._load):
        cached.cache_clear()
    yield
    for cached in (dispatch._fastest, dispatch._load):
        cached.cache_clear()


@pytest.mark.parametrize("backend", [None, *available_backends("cpu")])
def test_every_backend_of_the_cpu_agrees(backend: str | None) -> None:
    case = make_case(63, (0, 40, 48, 56), 0.5, torch.float32)
    assert_close(sparse_project(*case, backend=backend), oracle(case), case)


@pytest.mark.parametrize("backend", [None, *available_backends("cpu")])
def test_every_backend_takes_quantized_matrices(backend: str | None) -> None:
    case = make_case(63, (0, 40, 48, 56), 0.5, torch.float32)
    matrix = QuantizedMatrix.int8(case.weight)
    wide = case._replace(weight=matrix.dequantize())
    assert_close(sparse_project(*case._replace(weight=matrix), backend=backend), oracle(wide), wide)


def test_the_reference_is_always_there() -> None:
    assert available_backends("cpu")[-1] == available_backends("cuda")[-1] == "reference"
    assert "triton" not in available_backends("cpu")


def test_falls_back_to_the_reference_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "teal_kernels.cpu", None)
    case = make_case(8, (0, 4), 0.5, torch.float32)
    with pytest.warns(RuntimeWarning, match="numba cannot be used here"):
        y = sparse_project(*case)
    assert_close(y, oracle(case), case)
    quantized = case._replace(weight=QuantizedMatrix.int8(torch.ones(8, 8)), offsets=(0, 8))
    assert torch.equal(sparse_project(*quantized), sparse_project(*quantized, backend="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_project(*case)
    assert available_backends("cpu") == ["reference"]


def test_a_backend_that_was_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "teal_kernels.cpu", None)
    with pytest.raises(ImportError):
        sparse_project(*make_case(8, (0, 4), 0.5, torch.float32), backend="numba")
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        sparse_project(*make_case(8, (0, 4), 0.5, torch.float32), backend="cuda")
