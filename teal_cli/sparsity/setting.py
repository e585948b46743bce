"""A setting: how sparse a model decodes, and the thresholds that make it so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from teal_kernels.tensors import RecoveryVectors
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
    vectors: RecoveryVectors | None = None  # of sparse positions; None is the model's own

    def __post_init__(self) -> None:
        check_target(self.target_sparsity)
        if self.thresholds is None:
            if self.vectors is not None:
                raise ValueError("a dense setting has no vectors")
            return
        if self.thresholds.ndim != 2 or self.thresholds.shape[1] != len(PROJECTIONS):
            shape = tuple(self.thresholds.shape)
            raise ValueError(f"thresholds are {shape}, not [num_hidden_layers, {len(PROJECTIONS)}]")
        plain = self.thresholds.to(torch.float32).contiguous()
        object.__setattr__(self, "thresholds", plain)

    @property
    def label(self) -> str:
        """As tables, figures and errors name it."""
        if self is DENSE:
            return "dense"
        return f"{self.shown_method} {self.target_sparsity:.4g}"

    @property
    def shown_method(self) -> str:
        """The method, and whether vectors win back what it loses."""
        return self.method if self.vectors is None else f"{self.method}, recovered"


DENSE = Setting("dense", 0.0, None)
