"""A model's shape: what belongs to it must share it, and skips are weighed by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_cli.model.sites import PROJECTIONS


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model must share with a profile for the profile to fit it."""

    num_hidden_layers: int
    projections: tuple[tuple[int, int], ...]  # (in_features, out_features), in PROJECTIONS order

    @classmethod
    def of(cls, config: ModelConfig) -> ModelShape:
        """The shape of a model."""
        return cls(config.num_hidden_layers, tuple(config.projection_shapes.values()))

    @property
    def weight_shares(self) -> Tensor:
        """Each projection's share of a layer's weights, float64 [7]."""
        return self._sizes / self._sizes.sum()

    def weighted(self, shares: Tensor, names: Sequence[str] = PROJECTIONS) -> Tensor:
        """Shares [..., layers, 7] of projections → of the weights of those named, [...]."""
        columns = [PROJECTIONS.index(name) for name in names]
        sizes = self._sizes[columns]
        return (shares.double().mean(-2)[..., columns] * sizes).sum(-1) / sizes.sum()

    @property
    def _sizes(self) -> Tensor:
        return torch.tensor([i * o for i, o in self.projections], dtype=torch.float64)
