"""Built-in profiles: the thresholds and greedy tables that the TEAL authors released.

The figures are data of the release that accompanies "Training-Free Activation Sparsity in Large
Language Models" (arXiv 2408.14690, MIT licence); README.md beside the files says what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from teal_cli.sparsity.profile import ModelShape, Profile
from teal_cli.sparsity.quantiles import Quantiles

_FOLDER = Path(__file__).parent
_GREEDY_UNIT = 1e-4


def preset_for(name: str) -> Profile | None:
    """The built-in profile of a model on the Hub; None if there is none.

    It belongs to the weights that the model's authors published, whatever the fingerprint of
    their conversion.
    """
    data = _read(name)
    if data is None or "values" not in data:
        return None
    values = torch.from_numpy(data["values"]).double() * torch.from_numpy(data["scale"])[..., None]
    shares = torch.from_numpy(data["shares"]).expand_as(values)
    return Profile(
        model=name,
        fingerprint=None,
        shape=ModelShape(
            num_hidden_layers=values.shape[0],
            projections=tuple((int(rows), int(columns)) for rows, columns in data["projections"]),
        ),
        quantiles=Quantiles(shares, values),
        allocations={"greedy": _greedy(data)},
        provenance={"dataset": "the TEAL authors' release (built in)"},
    )


def allocations_for(name: str) -> dict[str, Tensor]:
    """The released allocations of a model on the Hub, to go with histograms calibrated here.

    Llama-3-8B has nothing else: the histograms released for it are Llama-2-7B's.
    """
    data = _read(name)
    return {} if data is None else {"greedy": _greedy(data)}


def _greedy(data: Mapping[str, Any]) -> Tensor:
    """The greedy search's sparsities, float32 [A, num_hidden_layers, 7]."""
    levels = data["greedy_steps"].cumsum(0, dtype=numpy.int64)
    return torch.from_numpy(levels).mul(_GREEDY_UNIT).float()


def _read(name: str) -> dict[str, Any] | None:
    names = {path.stem.replace("--", "/").lower(): path for path in _FOLDER.glob("*.npz")}
    path = names.get(name.lower())
    if path is None:
        return None
    with numpy.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
