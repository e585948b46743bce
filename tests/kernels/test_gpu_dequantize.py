"""Integers to floats on the GPU, bit for bit what torch's operations on the CPU give.

On a CUDA device, or on the CPU in Triton's interpreter (see `test_gpu_interpreted.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from teal_kernels import quantized
from teal_kernels.quantized import QuantizedMatrix, QuantizedRows
from torch import Tensor

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def _rounded(w: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    if device == "cpu" and dtype == torch.bfloat16:  # Triton's interpreter cuts bits off
        w = (w.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return w.to(device, dtype)


def _matrix(inputs: int, outputs: int, group: int) -> QuantizedMatrix:
    weight = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(outputs))
    return QuantizedMatrix.int4(weight, group) if group else QuantizedMatrix.int8(weight)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, matrices are dequantized by the kernel, on a CPU as well."""
    from teal_kernels import dequantize, quantized

    return lambda: monkeypatch.setattr(quantized, "_kernel", lambda _: dequantize.dequantize)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("group", [0, 64, 128, 14])
@pytest.mark.parametrize(
    ("outputs", "start", "end"),
    [(8, 0, 8), (104, 3, 70), (104, 101, 104), (576, 64, 320), (576, 63, 576), (1096, 0, 1096)],
)
def test_columns(
    outputs: int,
    start: int,
    end: int,
    group: int,
    dtype: torch.dtype,
    device: str,
    by_kernel: Callable[[], None],
) -> None:
    matrix = _matrix(37, outputs, group)
    expected = _rounded(matrix.dequantize(start, end), dtype, device)
    by_kernel()
    assert torch.equal(matrix.to(device).dequantize(start, end, dtype=dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16", "fp32"])
def test_rows(dtype: torch.dtype, device: str, by_kernel: Callable[[], None]) -> None:
    matrix = QuantizedRows.int8(torch.randn(37, 1096, generator=torch.Generator().manual_seed(3)))
    expected = _rounded(matrix.dequantize(3, 30), dtype, device)
    by_kernel()
    assert torch.equal(matrix.to(device).dequantize(3, 30, dtype=dtype), expected)


def test_nothing_is_nothing(device: str, by_kernel: Callable[[], None]) -> None:
    by_kernel()
    for group in (0, 64):
        assert _matrix(5, 64, group).to(device).dequantize(64, 64).shape == (5, 0)
    rows = QuantizedRows.int8(torch.ones(5, 8)).to(device)
    assert rows.dequantize(5, 5).shape == (0, 8)


@pytest.mark.parametrize("group", [0, 64])
def test_a_product_takes_this_way(
    group: int, device: str, by_kernel: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, x = _matrix(37, 200, group), torch.randn(3, 37)
    expected = x.double() @ matrix.dequantize(5, 190).double()
    by_kernel()
    monkeypatch.setitem(quantized._TILE_BYTES, device, 37 * 4 * 100)  # tiles of 64 columns
    y = matrix.to(device).multiply(x.to(device), 5, 190)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=1e-5)
