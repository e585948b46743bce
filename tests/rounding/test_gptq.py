"""GPTQ: smaller output errors than rounding alone, whatever the inputs are."""

from __future__ import annotations

import itertools

import pytest
import torch
from teal_kernels.quantized import QuantizedMatrix

from teal_cli.rounding.gptq import gptq


def correlated_inputs(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """float32 [tokens, channels] of falling variance, mixed from half as many causes."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, channels // 2, generator=generator)
    mixed = causes @ torch.randn(channels // 2, channels, generator=generator)
    own = torch.randn(tokens, channels, generator=generator)
    return (mixed * 0.3 + own) * torch.logspace(0.5, -0.5, channels)


def output_error(x: torch.Tensor, weight: torch.Tensor, matrix: QuantizedMatrix) -> float:
    """Share of the outputs' energy, in float64."""
    wide = x.double()
    expected = wide @ weight.double()
    return float((expected - wide @ matrix.dequantize(dtype=torch.float64)).square().sum()) / float(
        expected.square().sum()
    )


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (130, 72), (300, 200), (17, 8)])
@pytest.mark.parametrize("group", [64, 128])
def test_beats_rounding_on_inputs_that_it_did_not_see(
    inputs: int, outputs: int, group: int
) -> None:
    weight = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(1))
    x = correlated_inputs(4096, inputs)
    seen, unseen = x[:3072], x[3072:]
    compensated = gptq(weight, seen.T @ seen, group)
    nearest = QuantizedMatrix.int4(weight, group)
    assert compensated.shape == nearest.shape
    assert compensated.nbytes == nearest.nbytes
    assert output_error(unseen, weight, compensated) < 0.9 * output_error(unseen, weight, nearest)


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    hessian = torch.diag(torch.linspace(1, 2, 40))
    matrix, nearest = gptq(weight, hessian, 64), QuantizedMatrix.int4(weight, 64)
    error = (matrix.dequantize() - weight).square().sum()
    assert error <= (nearest.dequantize() - weight).square().sum() * 1.001


@pytest.mark.parametrize("dead", [[3], [0, 1, 2, 39], list(range(40))])
def test_channels_that_are_always_zero(dead: list[int]) -> None:
    x = correlated_inputs(256, 40)
    x[:, dead] = 0
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    found = gptq(weight, x.T @ x, 64).dequantize()
    assert found.isfinite().all()
    # Nothing is spread to them, so that they are as near as alone: other text may use them.
    nearest = QuantizedMatrix.int4(weight, 64).dequantize()
    error, alone = ((rounded - weight)[dead].square().sum(1) for rounded in (found, nearest))
    assert (error < 1.1 * alone).all()


def test_grids_are_near_the_best_that_a_search_finds() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    found = gptq(weight, torch.eye(32), 64)
    even = (weight / found.scales).double()
    low, high = even.aminmax(dim=1, keepdim=True)
    best = torch.full((32,), torch.inf, dtype=torch.float64)
    for first, last in itertools.product(torch.linspace(0.6, 1.0, 41).tolist(), repeat=2):
        step = (high * last - low * first) / 15
        rounded = ((even - low * first) / step).round().clamp(0, 15) * step + low * first
        error = ((rounded - even) * found.scales).square().sum(1)
        best = torch.minimum(best, error)
    error = (found.dequantize() - weight).double().square().sum(1)
    assert error.sum() < 1.02 * best.sum()


def test_columns_of_any_size_are_rounded_alike() -> None:
    """Each to its own scale: without, columns of a 16th of their neighbours' size would be lost."""
    x, generator = correlated_inputs(2048, 96), torch.Generator().manual_seed(1)
    weight = torch.randn(96, 128, generator=generator)
    powers = 2.0 ** torch.randint(-4, 5, (128,), generator=generator)
    hessian, errors = x.T @ x, []
    for scaled in (weight, weight * powers):
        matrix = gptq(scaled, hessian, 64)
        difference = x @ (matrix.dequantize() - scaled)
        errors.append(difference.square().sum(0) / (x @ scaled).square().sum(0))
    assert errors[1].max() < 4 * errors[0].max()


def test_fewer_tokens_than_channels_and_repeated_ones() -> None:
    x = correlated_inputs(5, 64).repeat(3, 1)
    x[:, 7] = x[:, 8]  # singular, but for the damping
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    weight[11], weight[12] = 0, 1e4
    matrix = gptq(weight, x.T @ x, 64)
    assert matrix.dequantize().isfinite().all()
    assert output_error(x, weight, matrix) <= output_error(
        x, weight, QuantizedMatrix.int4(weight, 64)
    )


@pytest.mark.parametrize("columns", [[5], range(32, 40), range(64), range(96)])
def test_columns_of_zeros_stay_zero(columns: list[int]) -> None:
    x, weight = correlated_inputs(256, 40), torch.randn(40, 96) + 3
    weight[:, list(columns)] = 0
    found = gptq(weight, x.T @ x, 64).dequantize()
    assert not found[:, list(columns)].any()
    assert found.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e19, 1e37])
def test_weights_of_any_size_are_rounded_alike(size: float) -> None:
    x = correlated_inputs(2048, 64)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    plain, scaled = (gptq(w, x.T @ x, 64) for w in (weight, weight * size))
    error = output_error(x, weight, plain)
    found = (scaled.dequantize().double() / size - weight.double()).square().sum()
    assert found < 1.05 * (plain.dequantize() - weight).double().square().sum()
    assert error < 0.01
    uneven = weight.clone()
    uneven[:, 7] *= size
    found = gptq(uneven, x.T @ x, 64).dequantize()
    assert found.isfinite().all()
    # The other group knows nothing of it; within its own, the largest outputs count most.
    assert found[:, 64:].equal(plain.dequantize()[:, 64:])


def test_the_arguments_are_left_alone() -> None:
    x, weight = correlated_inputs(64, 24), torch.randn(24, 16)
    hessian = x.T @ x
    hessian[5] = hessian[:, 5] = 0
    before = hessian.clone(), weight.clone()
    gptq(weight, hessian, 64)
    assert hessian.equal(before[0])
    assert weight.equal(before[1])
