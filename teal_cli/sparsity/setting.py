"""A setting: how sparse a model decodes, and the thresholds that make it so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.model.sites import PROJECTIONS


def check_target(sparsity: float) -> None:
    """Make sure that a sparsity can be asked for.

    Raises:
        UsageError: it is not in [0, 1).
    """
    if not 0.0 <= sparsity < 1.0:
        raise UsageError(f"sparsity must be at least 0 and below 1, got {sparsity:g}")


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """One method at one target sparsity, as chat, bench, eval and tasks put it on a model.

    Raises:
        UsageError: the target is not in [0, 1).
    """

    method: str
    target_sparsity: float
    thresholds: Tensor | None  # [num_hidden_layers, 7] float32; None is dense

    def __post_init__(self) -> None:
        check_target(self.target_sparsity)
        if self.thresholds is None:
            return
        if self.thresholds.ndim != 2 or self.thresholds.shape[1] != len(PROJECTIONS):
            shape = tuple(self.thresholds.shape)
            raise ValueError(f"thresholds are {shape}, not [num_hidden_layers, {len(PROJECTIONS)}]")
        plain = self.thresholds.to(torch.float32).contiguous()
        object.__setattr__(self, "thresholds", plain)

    @property
    def label(self) -> str:
        """As tables, figures and errors name it."""
        return "dense" if self is DENSE else f"{self.method} {self.target_sparsity:.4g}"


DENSE = Setting("dense", 0.0, None)
