"""How much of a model a run really skipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder, Observer
from teal_cli.model.sites import PROJECTIONS, SITE_OF, SITES


class SkipCount:
    """Counts the inputs that thresholds skip, over every sparse position that it observes."""

    def __init__(self, decoder: Decoder, thresholds: Tensor | None) -> None:
        """Count for thresholds [num_hidden_layers, 7]; None is dense, and skips nothing."""
        self._config = decoder.config
        self._levels = None if thresholds is None else thresholds.tolist()
        shape = (decoder.config.num_hidden_layers, len(PROJECTIONS))
        self._kept = torch.zeros(shape, dtype=torch.int64, device=decoder.device)
        self.positions = 0

    def observer(self, sparse_from: int) -> Observer | None:
        """What a pass of the decoder whose positions are sparse from here on is to call."""
        levels = self._levels
        if levels is None:
            return None

        def count(layer: int, site: str, x: Tensor) -> None:
            size = x[sparse_from:].abs().float()
            if layer == 0 and site == SITES[0]:
                self.positions += len(size)
            counted: dict[float, Tensor] = {}  # projections of a site often share a threshold
            for index, name in enumerate(PROJECTIONS):
                if SITE_OF[name] == site:
                    level = levels[layer][index]
                    if level not in counted:
                        counted[level] = (size > level).sum()
                    self._kept[layer, index] += counted[level]

        return count

    def by_projection(self) -> dict[str, float]:
        """Share of each projection's inputs that was skipped, the mean of all layers."""
        realised = torch.zeros(len(PROJECTIONS), dtype=torch.float64)
        if self._levels is not None and self.positions:
            inputs = torch.tensor([i for i, _ in self._config.projection_shapes.values()])
            realised = 1 - self._kept.cpu().double().mean(0) / (self.positions * inputs)
        return dict(zip(PROJECTIONS, realised.tolist(), strict=True))


def by_site(by_projection: dict[str, float], config: ModelConfig) -> dict[str, float]:
    """Share skipped of each site, its projections weighted by their weights."""
    return {
        site: weighted(by_projection, config, [n for n in PROJECTIONS if SITE_OF[n] == site])
        for site in SITES
    }


def weighted(
    by_projection: dict[str, float], config: ModelConfig, names: Sequence[str] = PROJECTIONS
) -> float:
    """Share skipped of some projections' weights, by default of the model's."""
    sizes = {name: i * o for name, (i, o) in config.projection_shapes.items()}
    total = sum(sizes[name] for name in names)
    return sum(by_projection[name] * sizes[name] for name in names) / total
