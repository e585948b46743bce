"""Changes to a model's folder, as functions of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Edit = Callable[[Path], None]
REMOVED = object()  # a field's value that takes the field out


def edit_json(name: str, **changes: Any) -> Edit:
    """Put fields into a JSON file of the folder, which need not be there yet."""

    def edit(folder: Path) -> None:
        path = folder / name
        fields = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
        kept = {key: value for key, value in fields.items() if value is not REMOVED}
        path.write_text(json.dumps(kept))

    return edit


def edit_config(**changes: Any) -> Edit:
    """Put fields into config.json."""
    return edit_json("config.json", **changes)


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    """Change the tensors of model.safetensors in place."""

    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def rename(old: str, new: str) -> Edit:
    """Give a file another name."""
    return lambda folder: (folder / old).rename(folder / new) and None


def remove(*patterns: str) -> Edit:
    """Take files out of the folder."""

    def edit(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return edit


def write(name: str, text: str) -> Edit:
    """Put a file into the folder."""
    return lambda folder: (folder / name).write_text(text) and None
