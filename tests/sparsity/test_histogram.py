"""Histograms and the quantiles read from them, against the activations themselves."""

from __future__ import annotations

import pytest
import torch

from teal_cli.model.sites import PROJECTIONS, SITES
from teal_cli.sparsity import histogram
from teal_cli.sparsity.quantiles import Quantiles

DRAWS = 500_000
SPARSITIES = (0.001, 0.01, 0.1, 0.25, 0.4, 0.5, 0.65, 0.8, 0.9, 0.99)


def sample(kind: str, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(DRAWS, generator=generator)
    if kind == "laplace":
        u = torch.rand(DRAWS, generator=generator) - 0.5
        x = -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))
    elif kind == "heavy":
        x = x * x.abs()
    return x * scale


def quantiles(x: torch.Tensor) -> Quantiles:
    return Quantiles.from_counts(histogram.count(x).expand(1, len(SITES), -1))


def table(value: float) -> torch.Tensor:
    return torch.full((1, len(PROJECTIONS)), value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [(kind, scale) for kind in ("gaussian", "laplace") for scale in (1e-4, 0.3, 500.0)]
    + [("heavy", 0.3), ("heavy", 500.0)],
)
def test_thresholds_realise_their_sparsity(kind: str, scale: float) -> None:
    x = sample(kind, scale)
    curves = quantiles(x)
    ordered = x.abs().double().sort().values
    for sparsity in SPARSITIES:
        threshold = curves.thresholds(table(sparsity)).float()
        assert torch.equal(threshold, threshold[:, :1].expand_as(threshold))
        realised = (x.abs() <= threshold[0, 0]).double().mean().item()
        assert realised == pytest.approx(sparsity, abs=0.002)
        assert curves.sparsity(threshold)[0, 0] == pytest.approx(realised, abs=0.002)
        # ... and lies within a bin's width, 1/64, of the exact quantile.
        exact = ordered[round(sparsity * (DRAWS - 1))].item()
        assert threshold[0, 0].item() == pytest.approx(exact, rel=1 / 64, abs=2**-24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = sample("gaussian", 1.0).to(dtype)
    assert torch.equal(histogram.count(x), histogram.count(x.float()))


def test_exact_zeros_are_mass_at_zero() -> None:
    x = sample("gaussian", 1.0)
    x[: DRAWS * 3 // 10] = 0.0
    x[0] = -0.0
    curves = quantiles(x)
    for sparsity in (0.0, 0.1, 0.29999):
        assert not curves.thresholds(table(sparsity)).any()
    assert curves.sparsity(table(0.0))[0, 0] == pytest.approx(0.3)
    assert curves.thresholds(table(0.31))[0, 0] > 0
    threshold = curves.thresholds(table(0.65))[0, 0]
    assert (x.abs() <= threshold).double().mean() == pytest.approx(0.65, abs=0.002)


def test_bins_hold_what_their_edges_say() -> None:
    edges = histogram.upper_edges()
    assert edges[0] == 0
    assert (edges.diff() > 0).all()
    assert (edges[2:].diff() / edges[2:-1]).max() <= 1 / 64 + 1e-12
    inner = edges[1:-1].float()  # each begins the bin above it
    counts = histogram.count(inner)
    assert counts[0] == counts[1] == 0
    assert (counts[2:] == 1).all()
    just_below = torch.nextafter(edges[1:].float(), torch.zeros(1))
    assert (histogram.count(just_below)[1:] == 1).all()


def test_extremes_are_clamped_not_lost() -> None:
    x = torch.tensor([1e-30, -1e-30, 1e30, -3e38, 65536.0, 0.0])
    counts = histogram.count(x)
    assert counts.sum() == 6
    assert (counts[0], counts[1], counts[-1]) == (1, 2, 3)


def test_histograms_add_up() -> None:
    x = sample("laplace", 1.0).view(100, -1)
    parts = sum((histogram.count(part) for part in x), torch.zeros(histogram.BINS).long())
    assert torch.equal(parts, histogram.count(x))


def test_sparsity_of_dense_and_of_everything() -> None:
    curves = quantiles(sample("gaussian", 1.0))
    assert not curves.sparsity(table(-torch.inf)).any()
    assert (curves.sparsity(table(1e9)) == 1).all()
    assert (curves.limit == 1).all()
