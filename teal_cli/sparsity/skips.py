"""How much of a model was really skipped: counted and weighted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teal_cli.model.decoder import Decoder, Observer
from teal_cli.model.sites import PROJECTIONS, SITE_OF, SITES
from teal_cli.sparsity.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Skips:
    """What thresholds kept of every projection's inputs, summed over a number of tokens."""

    shape: ModelShape
    kept: Tensor  # int64 [num_hidden_layers, 7], channels
    positions: int

    @property
    def shares(self) -> Tensor:
        """Share of each projection's inputs that was skipped, float64 [num_hidden_layers, 7]."""
        return self._skipped(self.kept.double())

    @property
    def realised_sparsity(self) -> float:
        """Share of the projections' weights that was skipped."""
        return float(self.shape.weighted(self._means))

    def by_projection(self) -> dict[str, float]:
        """Share of each projection's inputs that was skipped, the mean of all layers."""
        return dict(zip(PROJECTIONS, self._means[0].tolist(), strict=True))

    def by_site(self) -> dict[str, float]:
        """Share skipped of each site, its projections weighted by their weights."""
        readers = {site: [n for n in PROJECTIONS if SITE_OF[n] == site] for site in SITES}
        weighted = self.shape.weighted
        return {site: float(weighted(self._means, names)) for site, names in readers.items()}

    @property
    def _means(self) -> Tensor:
        """Of all layers, [1, 7]."""
        return self._skipped(self.kept.double().mean(0, keepdim=True))

    def _skipped(self, kept: Tensor) -> Tensor:
        inputs = torch.tensor([inputs for inputs, _ in self.shape.projections])
        return 1 - kept / (self.positions * inputs) if self.positions else torch.zeros_like(kept)


class SkipCount:
    """Counts the inputs that thresholds keep, over every sparse position that it observes."""

    def __init__(self, decoder: Decoder, thresholds: Tensor | None) -> None:
        """Count for thresholds [num_hidden_layers, 7]; None is dense, and skips nothing."""
        self._shape = ModelShape.of(decoder.config)
        self._levels = None if thresholds is None else thresholds.tolist()
        table = (decoder.config.num_hidden_layers, len(PROJECTIONS))
        self._kept = torch.zeros(table, dtype=torch.int64, device=decoder.device)
        self._positions = 0

    def observer(self, sparse_from: int = 0) -> Observer | None:
        """What a pass of the decoder whose positions are sparse from here on is to call."""
        levels = self._levels
        if levels is None:
            return None

        def count(layer: int, site: str, x: Tensor) -> None:
            size = x[sparse_from:].abs().float()
            if layer == 0 and site == SITES[0]:
                self._positions += len(size)
            counted: dict[float, Tensor] = {}  # projections of a site often share a threshold
            for index, name in enumerate(PROJECTIONS):
                if SITE_OF[name] == site:
                    level = levels[layer][index]
                    if level not in counted:
                        counted[level] = (~(size <= level)).sum()  # NaN is kept
                    self._kept[layer, index] += counted[level]

        return count

    def skips(self) -> Skips:
        """What was counted so far."""
        return Skips(self._shape, self._kept.cpu(), self._positions)

    def clear(self) -> None:
        """Start counting anew."""
        self._kept.zero_()
        self._positions = 0
