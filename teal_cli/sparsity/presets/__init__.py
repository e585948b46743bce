"""Built-in profiles: those of the TEAL authors' release, and the demo model's.

The release accompanies "Training-Free Activation Sparsity in Large Language Models"
(arXiv 2408.14690, MIT licence); README.md beside the files says what they hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from teal_cli.sparsity.profile import METHODS, Profile
from teal_cli.sparsity.quantiles import Quantiles
from teal_cli.sparsity.recovery import FIELDS, Recovery
from teal_cli.sparsity.shape import ModelShape
from teal_cli.store.demo import GGUF, GGUF_SHA256

_FOLDER = Path(__file__).parent
_UNIT = 1e-4  # of sparsity, in allocations
# Files that are known by their content, whatever name they go by.
_SOURCES = {f"sha256:{GGUF_SHA256}": GGUF.removesuffix(".gguf")}
_RELEASE = {"dataset": "the TEAL authors' release (built in)"}


def preset_for(name: str, source: str = "") -> Profile | None:
    """The built-in profile of a model; None if there is none.

    A model on the Hub is known by its name, and the profile belongs to the weights that its
    authors published, whatever the fingerprint of their conversion.

    Args:
        name: the model's.
        source: the fingerprint of the files that it was converted from.
    """
    data = _read(_SOURCES.get(source, name))
    if data is None or "values" not in data:
        return None
    values = torch.from_numpy(data["values"]).double() * torch.from_numpy(data["scale"])[..., None]
    shares = torch.from_numpy(data["shares"]).expand_as(values)
    shape = ModelShape(
        num_hidden_layers=values.shape[0],
        projections=tuple((int(rows), int(columns)) for rows, columns in data["projections"]),
    )
    return Profile(
        model=name,
        fingerprint=None,
        shape=shape,
        quantiles=Quantiles(shares, values),
        allocations=_allocations(data),
        offsets={
            method: torch.from_numpy(data[f"{method}_offsets"])
            for method in METHODS
            if f"{method}_offsets" in data
        },
        recovery=_recovery(data, shape),
        provenance=json.loads(str(data["provenance"])) if "provenance" in data else _RELEASE,
    )


def allocations_for(name: str) -> dict[str, Tensor]:
    """The released allocations of a model on the Hub, to go with histograms calibrated here.

    Llama-3-8B has nothing else: the histograms released for it are Llama-2-7B's.
    """
    data = _read(name)
    return {} if data is None else _allocations(data)


def _recovery(data: Mapping[str, Any], shape: ModelShape) -> dict[str, Recovery]:
    """Vectors by method, as a profile's file has them."""
    headers = json.loads(str(data["recovery"])) if "recovery" in data else {}
    return {
        method: Recovery.of(
            header, {n: torch.from_numpy(data[f"{method}_{n}"]) for n in FIELDS}, shape
        )
        for method, header in headers.items()
    }


def _allocations(data: Mapping[str, Any]) -> dict[str, Tensor]:
    """The sparsities that methods give, float32 [A, num_hidden_layers, 7] each."""
    found = {}
    for method in METHODS:
        if f"{method}_steps" in data:
            levels = data[f"{method}_steps"].cumsum(0, dtype=numpy.int64)
            found[method] = torch.from_numpy(levels).mul(_UNIT).float()
    return found


def _read(name: str) -> dict[str, Any] | None:
    names = {path.stem.replace("--", "/").lower(): path for path in _FOLDER.glob("*.npz")}
    path = names.get(name.lower())
    if path is None:
        return None
    with numpy.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
