"""What a run of Adam has learnt so far, on disk: a killed run goes on at the step where it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from teal_cli.sparsity.workspace import Workspace


class Learning:
    """What was learnt so far of one target, written after each step."""

    def __init__(self, key: str, workspace: Workspace) -> None:
        self._key = key
        folder = workspace.folder
        self._path: Path | None = None if folder is None else folder / "recover.safetensors"

    def save(
        self, done: int, weights: Mapping[str, Tensor], optimiser: torch.optim.Adam, asked: float
    ) -> None:
        from safetensors.torch import save

        from teal_cli.store import artifacts

        if self._path is None:
            return
        tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            state = optimiser.state[weight]
            tensors |= {
                name: weight,
                f"{name}.exp_avg": state["exp_avg"],
                f"{name}.exp_avg_sq": state["exp_avg_sq"],
            }
        header = {"key": self._key, "done": str(done), "asked": repr(asked)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.atomic_write(self._path, save(tensors, metadata=header))

    def load(
        self, weights: Mapping[str, Tensor], optimiser: torch.optim.Adam, asked: float
    ) -> tuple[int, float]:
        """Put back what a killed run left: the steps that are done, and what is asked."""
        from safetensors import SafetensorError, safe_open

        if self._path is None:
            return 0, asked
        try:
            with safe_open(self._path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("key") != self._key:
                    return 0, asked
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return 0, asked
        done = int(header["done"])
        for name, weight in weights.items():
            weight.copy_(tensors[name])
            optimiser.state[weight] = {
                "step": torch.tensor(float(done)),
                "exp_avg": tensors[f"{name}.exp_avg"].to(weight.device),
                "exp_avg_sq": tensors[f"{name}.exp_avg_sq"].to(weight.device),
            }
        return done, float(header["asked"])
