"""Sparsity ↔ threshold, through the distribution of abs(x) at every layer and site."""

from __future__ import annotations

import torch
from torch import Tensor

from teal_cli.model.sites import PROJECTIONS, SITE_OF, SITES
from teal_cli.sparsity import histogram

# Projections that read the same site share its distribution.
_SITE_INDEX = [SITES.index(SITE_OF[projection]) for projection in PROJECTIONS]


class Quantiles:
    """Piecewise linear distributions of abs(x), one for each layer and site.

    `shares` and `values` are float64 [num_hidden_layers, 4, N], ascending along N: a share
    `shares[n]` of all activations has abs(x) <= `values[n]`, and `values[0]` is 0.
    """

    def __init__(self, shares: Tensor, values: Tensor) -> None:
        self.shares = shares.double()
        self.values = values.double()

    @classmethod
    def from_counts(cls, counts: Tensor) -> Quantiles:
        """From histograms, int64 [num_hidden_layers, 4, BINS]; linear inside a bin."""
        cumulative = counts.cumsum(-1).double()
        shares = cumulative / cumulative[..., -1:]
        return cls(shares, histogram.upper_edges().expand_as(shares))

    @property
    def limit(self) -> Tensor:
        """The largest sparsity that has a threshold, float64 [num_hidden_layers, 7]."""
        return self.shares[:, _SITE_INDEX, -1]

    def thresholds(self, sparsity: Tensor) -> Tensor:
        """The smallest t with a share `sparsity` [num_hidden_layers, 7] of abs(x) <= t.

        A sparsity beyond the limit gets the limit's threshold.
        """
        return _interpolate(self.shares, self.values, sparsity, right=False)

    def sparsity(self, thresholds: Tensor) -> Tensor:
        """The share of abs(x) <= t, [num_hidden_layers, 7]; 0 where t is negative (dense)."""
        shares = _interpolate(self.values, self.shares, thresholds, right=True)
        return torch.where(thresholds < 0, 0.0, shares)


def _interpolate(xs: Tensor, ys: Tensor, x: Tensor, *, right: bool) -> Tensor:
    """y(x) of the sites' curves xs → ys at the projections' x [L, 7], float64; flat outside.

    Where xs repeats a value, `right` chooses which of its ys counts: the last or the first.
    """
    xs, ys = xs[:, _SITE_INDEX], ys[:, _SITE_INDEX]
    x = x.double()[..., None].contiguous()
    last = xs.shape[-1] - 1
    after = torch.searchsorted(xs, x, right=right)
    low, high = (after - 1).clamp(0, last), after.clamp(0, last)
    x0, x1 = xs.gather(-1, low), xs.gather(-1, high)
    part = torch.where(x1 > x0, (x - x0) / (x1 - x0), 1.0).clamp(0, 1)
    return torch.lerp(ys.gather(-1, low), ys.gather(-1, high), part)[..., 0]
