"""Matrices of integers: what their rows hold, and how far they are from the floats."""

from __future__ import annotations

import sys

import pytest
import torch
from teal_kernels import quantized
from teal_kernels.quantized import (
    QuantizedMatrix,
    QuantizedRows,
    column_sizes,
    int4_codes,
    int4_grid,
    int4_rows,
)


def random_weight(inputs: int, outputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("outputs", [8, 64, 104, 576])
def test_int8_is_within_half_a_step(outputs: int) -> None:
    weight = random_weight(37, outputs)
    matrix = QuantizedMatrix.int8(weight)
    assert matrix.shape == (37, outputs)
    error = (matrix.dequantize() - weight).abs()
    assert (error <= weight.abs().amax(0) / 127 * 0.5001).all()


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("outputs", [8, 64, 104, 576])
def test_int4_is_within_half_a_step(outputs: int, group: int) -> None:
    weight = random_weight(37, outputs) * torch.logspace(-2, 2, outputs)
    matrix = QuantizedMatrix.int4(weight, group)
    assert matrix.shape == (37, outputs)
    assert matrix.rows.shape[1] == outputs // 2 + 4 * -(-outputs // group)
    assert matrix.scales.equal(column_sizes(weight))
    for start in range(0, outputs, group):
        end = min(start + group, outputs)
        scales = matrix.scales[start:end]
        part = weight[:, start:end] / scales
        step = (part.amax(1) - part.amin(1)) / 15
        error = (matrix.dequantize(start, end) / scales - part).abs().amax(1)
        # float16 rounds scale and offset.
        assert (error <= step * 0.5 + part.abs().amax(1) * 2**-10).all()


def test_int4_rows_hold_codes_steps_and_offsets() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 1)
    steps = torch.tensor([[1.0, 2.0]] * 3, dtype=torch.float16)
    offsets = torch.tensor([[-8.0, 0.5]] * 3, dtype=torch.float16)
    scales = torch.tensor([1.0, 4.0] * 8)
    matrix = QuantizedMatrix(int4_rows(codes, steps, offsets), scales, 16, 8)
    assert matrix.rows[0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    expected = [code - 8.0 for code in range(8)] + [code * 2 + 0.5 for code in range(8, 16)]
    expected = [value * (4 if code % 2 else 1) for code, value in enumerate(expected)]
    assert matrix.dequantize()[1].tolist() == expected
    assert matrix.dequantize(3, 11)[2].tolist() == expected[3:11]


@pytest.mark.parametrize("group", [0, 64, 128])
@pytest.mark.parametrize(("start", "end"), [(0, 1), (3, 70), (64, 96), (101, 104), (63, 104)])
def test_any_columns_can_be_had_alone(group: int, start: int, end: int) -> None:
    weight, x = random_weight(9, 104), torch.randn(2, 9, dtype=torch.float64)
    matrix = QuantizedMatrix.int4(weight, group) if group else QuantizedMatrix.int8(weight)
    part = matrix.dequantize()[:, start:end]
    assert torch.equal(matrix.dequantize(start, end), part)
    torch.testing.assert_close(matrix.multiply(x, start, end), x @ part.double())


@pytest.mark.parametrize("value", [0.0, 1.5, -3.0, 60000.0])
def test_constant_and_outlier_columns(value: float) -> None:
    weight = random_weight(16, 64)
    weight[:, 5] = value
    weight[3] = value
    assert torch.isfinite(QuantizedMatrix.int8(weight).dequantize()).all()
    int8 = QuantizedMatrix.int8(weight).dequantize()
    torch.testing.assert_close(int8[:, 5], weight[:, 5])
    int4 = QuantizedMatrix.int4(weight, 64)
    even = weight / torch.where(int4.scales > 0, int4.scales, 1)
    step = (even.amax(1, keepdim=True) - even.amin(1, keepdim=True)) / 15
    error = (int4.dequantize() - weight).abs()
    assert (error <= (step * 0.5 + even.abs() * 2**-9) * int4.scales).all()
    assert (step[[row for row in range(16) if row != 3]] < 0.5).all()  # as without the outliers


@pytest.mark.parametrize("group", [0, 64])
def test_multiply_is_the_product_with_the_dequantized(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quantized._TILE_BYTES, "cpu", 40 * 8 * 200)  # tiles of 192 columns
    weight, x = random_weight(40, 1096), torch.randn(3, 40, dtype=torch.float64)
    matrix = QuantizedMatrix.int4(weight, group) if group else QuantizedMatrix.int8(weight)
    expected = x @ matrix.dequantize().double()
    torch.testing.assert_close(matrix.multiply(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_columns_are_brought_to_one_size(dtype: torch.dtype) -> None:
    weight = random_weight(1500, 64).to(dtype)
    weight[:, 5] = 0
    sizes = column_sizes(weight)
    expected = weight.double().square().mean(0).sqrt().float()
    torch.testing.assert_close(sizes, expected)
    # A column of another size is rounded to the same codes, and a power of two loses nothing.
    powers = 2.0 ** torch.randint(-6, 7, (64,), generator=torch.Generator().manual_seed(2))
    plain, scaled = (QuantizedMatrix.int4(w, 64) for w in (weight.float(), weight.float() * powers))
    assert scaled.dequantize().equal(plain.dequantize() * powers)


@pytest.mark.parametrize("columns", [[5], range(32, 40), range(64)])
@pytest.mark.parametrize("group", [0, 64])
def test_columns_of_zeros_stay_zero(columns: list[int], group: int) -> None:
    """As in pruned and padded models: whatever else lies in their groups."""
    weight = random_weight(40, 128) + 3
    weight[:, list(columns)] = 0
    matrix = QuantizedMatrix.int4(weight, group) if group else QuantizedMatrix.int8(weight)
    assert not matrix.dequantize()[:, list(columns)].any()
    assert matrix.dequantize()[:, 64:].all(0).any()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e19, 1e37])
def test_int4_of_weights_of_any_size(size: float) -> None:
    weight = random_weight(1500, 64)
    expected = QuantizedMatrix.int4(weight, 64).dequantize()
    found = QuantizedMatrix.int4(weight * size, 64).dequantize().double() / size
    largest = weight.abs().max().double()
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=0.01 * largest.item())
    uneven = weight.clone()
    uneven[:, 7] *= size
    found = QuantizedMatrix.int4(uneven, 64).dequantize()
    torch.testing.assert_close(found[:, :7], expected[:, :7], rtol=0, atol=0.01 * largest.item())


def test_codes_are_the_nearest() -> None:
    weight = random_weight(5, 64)
    scales, offsets = int4_grid(weight, 64)
    codes = int4_codes(weight, scales, offsets, 64)
    levels = torch.arange(16)[:, None, None] * scales.float() + offsets.float()
    nearest = (weight - levels).abs().argmin(0)
    assert torch.equal(codes.long(), nearest)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        QuantizedMatrix.int8(random_weight(4, 12))
    with pytest.raises(ValueError, match="odd"):
        QuantizedMatrix.int4(random_weight(4, 16), 7)
    with pytest.raises(ValueError, match="rows must be"):
        QuantizedMatrix(torch.zeros(4, 16), torch.ones(16), 16, 0)
    with pytest.raises(ValueError, match="scales"):
        QuantizedMatrix(torch.zeros(4, 16, dtype=torch.int8), torch.ones(15), 16, 0)
    with pytest.raises(ValueError, match="scales"):
        QuantizedMatrix(torch.zeros(4, 16, dtype=torch.int8), torch.ones(16).half(), 16, 0)


def test_rows_are_within_half_a_step() -> None:
    weight = random_weight(33, 48)
    weight[7] = 0
    rows = QuantizedRows.int8(weight)
    assert rows.shape == (33, 48)
    error = (rows.dequantize() - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all()
    assert torch.equal(rows.dequantize(5, 9), rows.dequantize()[5:9])


def test_without_triton_torch_dequantizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "teal_kernels.dequantize", None)  # as if the import failed
    quantized._kernel.cache_clear()
    try:
        assert quantized._kernel("cuda") is None
    finally:
        quantized._kernel.cache_clear()
    assert quantized._kernel("cpu") is None
