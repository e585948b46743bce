"""What a profile holds at one target: sparsities, thresholds, and histograms to look at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy
from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.model.sites import PROJECTIONS, SITE_OF, SITES
from teal_cli.sparsity.profile import Profile

_COLUMNS = 64
# A histogram ends where all but a hundredth of the activations lie: outliers reach a hundred times
# as far, and would leave the rest one column.
_DRAWN_SHARE = 0.99


@dataclass(frozen=True, slots=True)
class SiteHistogram:
    """abs(x) at one layer and site, in columns of equal width from 0 on."""

    layer: int
    site: str
    edges: tuple[float, ...]  # one more than columns
    shares: tuple[float, ...]  # of all activations, by column
    beyond: float  # the share above the last edge
    largest: float  # abs(x)
    thresholds: dict[str, float]  # by projection that reads the site
    below: dict[str, float]  # the share that each threshold skips of these dense activations


@dataclass(frozen=True, slots=True)
class Summary:
    """A profile at a target sparsity; tables are [num_hidden_layers, 7]."""

    profile: Profile
    target: float
    method: str
    sparsity: Tensor  # that the method gives each projection
    thresholds: Tensor
    histograms: tuple[SiteHistogram, ...]
    vectors: dict[str, list[float]] | None  # sizes by layer, as `Recovery.sizes`; None: it has none

    def document(self) -> dict[str, Any]:
        """The summary as data."""
        return {
            "model": self.profile.model,
            "fingerprint": self.profile.fingerprint,
            "methods": self.profile.methods,
            "provenance": dict(self.profile.provenance),
            "target_sparsity": self.target,
            "method": self.method,
            "projections": PROJECTIONS,
            "sparsity": self.sparsity.tolist(),
            "thresholds": self.thresholds.tolist(),
            "vectors": self.vectors,
            "histograms": [dataclasses.asdict(histogram) for histogram in self.histograms],
        }


def summarise(
    profile: Profile,
    target: float,
    method: str | None = None,
    *,
    layer: int | None = None,
    site: str | None = None,
) -> Summary:
    """Look a profile up.

    Args:
        profile: the profile.
        target: model-wide sparsity in [0, 1).
        method: one of the profile's, by default its best.
        layer: whose histograms to add.
        site: the only site to add; by default all four.

    Raises:
        UsageError: the profile has no such method or layer.
        TealError: the method does not reach the target.
    """
    method = method or profile.default_method
    thresholds = profile.thresholds(target, method)
    histograms: tuple[SiteHistogram, ...] = ()
    if layer is not None:
        layers = profile.shape.num_hidden_layers
        if not 0 <= layer < layers:
            raise UsageError(f"{profile.model} has no layer {layer}: they are 0 to {layers - 1}")
        sites = SITES if site is None else (site,)
        histograms = tuple(_histogram(profile, thresholds, layer, name) for name in sites)
    allocation = profile.allocation(profile.asked(target, method), method)
    recovery = profile.recovery.get(method)
    vectors = None
    if recovery is not None and recovery.reaches(target):
        vectors = recovery.sizes(target)
    return Summary(profile, target, method, allocation, thresholds, histograms, vectors)


def _histogram(profile: Profile, thresholds: Tensor, layer: int, site: str) -> SiteHistogram:
    shares = profile.quantiles.shares[layer, SITES.index(site)].numpy()
    values = profile.quantiles.values[layer, SITES.index(site)].numpy()
    # A site that is always zero still needs an axis.
    last = float(numpy.interp(_DRAWN_SHARE * shares[-1], shares, values)) or 1.0
    edges = numpy.linspace(0.0, last, _COLUMNS + 1)
    cumulative = numpy.interp(edges, values, shares)
    cumulative[0] = 0.0  # exact zeros belong to the first column
    below = profile.sparsity_at(thresholds)[layer]
    readers = [index for index, name in enumerate(PROJECTIONS) if SITE_OF[name] == site]
    return SiteHistogram(
        layer=layer,
        site=site,
        edges=tuple(edges.tolist()),
        shares=tuple(numpy.diff(cumulative).tolist()),
        beyond=float(1.0 - cumulative[-1]),
        largest=float(values[numpy.searchsorted(shares, shares[-1])]),
        thresholds={PROJECTIONS[i]: float(thresholds[layer, i]) for i in readers},
        below={PROJECTIONS[i]: float(below[i]) for i in readers},
    )
