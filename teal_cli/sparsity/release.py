"""Import of the files that the TEAL authors release for a model.

histograms/layer-{i}/{self_attn,mlp}/histograms.pt holds two histograms of signed activations
each, lookup/layer-{i}/results.csv the block-wise greedy search (arXiv 2408.14690, algorithm 1).
"""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from teal_cli.errors import MissingError, TealError, whole
from teal_cli.model.config import ModelConfig
from teal_cli.model.sites import PROJECTIONS, SITES
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.quantiles import Quantiles
from teal_cli.sparsity.shape import ModelShape

Array = numpy.ndarray[Any, numpy.dtype[numpy.float64]]

# Where a site's histogram is: its module's file, and the name of its tensors there.
_PLACES = {
    "attn_in": ("self_attn", "h1"),
    "attn_out": ("self_attn", "h2"),
    "mlp_in": ("mlp", "h1"),
    "mlp_act": ("mlp", "h2"),
}
_POINTS = 1001  # of the curve that is kept of 10,000 bins
_STEPS = 101  # of a greedy search, which has one row for each of its own steps


def import_release(
    folder: Path, config: ModelConfig, *, model: str, fingerprint: str | None
) -> Profile:
    """Build the profile of a model from a copy of its release.

    Args:
        folder: holds `histograms` and, if the greedy tables are wanted, `lookup`.
        config: the model's.
        model: the model's name.
        fingerprint: its checkpoint's.

    Raises:
        MissingError: a file is not there.
        TealError: a file is damaged, or the release is of another model.
    """
    if not (folder / "histograms").is_dir():
        raise MissingError(
            f"{folder} has no folder 'histograms'",
            hint="--import takes a model's folder of the TEAL release.",
        )
    layers = config.num_hidden_layers
    for kind in ("histograms", "lookup"):
        if (folder / kind / f"layer-{layers}").exists():
            raise TealError(f"{folder / kind} is of a model with more than {layers} layers")
    curves = [_curve(folder, layer, site, config) for layer in range(layers) for site in SITES]
    shares = torch.stack([share for share, _ in curves]).view(layers, len(SITES), _POINTS)
    values = torch.stack([value for _, value in curves]).view(layers, len(SITES), _POINTS)
    shape = ModelShape.of(config)
    allocations = {}
    if (folder / "lookup").is_dir():
        allocations["greedy"] = _greedy(folder / "lookup", shape)
    return Profile(
        model=model,
        fingerprint=fingerprint,
        shape=shape,
        quantiles=Quantiles(shares, values),
        allocations=allocations,
        provenance={"dataset": "a TEAL release (imported)"},
    )


def _curve(folder: Path, layer: int, site: str, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Shares and values of abs(x), float64 [_POINTS] each, from a histogram of x."""
    module, name = _PLACES[site]
    path = folder / "histograms" / f"layer-{layer}" / module / "histograms.pt"
    counts, centers = _load(path, name)
    if counts.sum() % config.site_sizes[site]:
        raise TealError(
            f"{path} is of another model: its counts are no multiple of {config.site_sizes[site]}",
            hint="The histograms released for Llama-3-8B are Llama-2-7B's: calibrate that model.",
        )
    middles = (centers[1:] + centers[:-1]) / 2
    edges = numpy.concatenate(
        [2 * centers[:1] - middles[:1], middles, 2 * centers[-1:] - middles[-1:]]
    )
    below = numpy.concatenate([[0.0], counts.cumsum()]) / counts.sum()
    # The outer bins hold all outliers, so that nothing is known beyond the nearer one's edge.
    limit = min(-edges[1], edges[-2])
    if limit <= 0:
        raise TealError(f"{path} is damaged: {name} is not a histogram around zero")
    values = numpy.linspace(0, limit, len(edges))
    shares = numpy.interp(values, edges, below) - numpy.interp(-values, edges, below)
    grid = numpy.linspace(0, shares[-1], _POINTS)
    return torch.from_numpy(grid), torch.from_numpy(numpy.interp(grid, shares, values))


def _load(path: Path, name: str) -> tuple[Array, Array]:
    """Counts and bin centers of one histogram, float64 [bins]."""
    keys = (name, f"{name}_centers")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MissingError(f"{path} is missing", hint="Copy the release again.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise TealError(
            f"{path} is damaged: {whole(error)}", hint="Copy the release again."
        ) from None
    found = content if isinstance(content, dict) else {}
    tensors = [found[key] for key in keys if isinstance(found.get(key), Tensor)]
    if len(tensors) < len(keys):
        raise TealError(f"{path} is damaged: it does not hold {' and '.join(keys)}")
    counts, centers = (tensor.double().numpy() for tensor in tensors)
    fits = counts.ndim == 1 and counts.shape == centers.shape and len(counts) > 2
    if not fits or not (counts >= 0).all() or not (numpy.diff(centers) > 0).all():
        raise TealError(f"{path} is damaged: {name} is not a histogram")
    return counts, centers


def _greedy(folder: Path, shape: ModelShape) -> Tensor:
    """The searches of all layers on one grid of the block's sparsity, float32 [A, layers, 7].

    A layer whose search ends early keeps its last row.
    """
    weights = shape.weight_shares.numpy()
    searches = [
        _read_search(folder / f"layer-{layer}" / "results.csv")
        for layer in range(shape.num_hidden_layers)
    ]
    reached = [search @ weights for search in searches]
    grid = numpy.linspace(0, max(totals[-1] for totals in reached), _STEPS)
    table = [
        [numpy.interp(grid, totals, column) for column in search.T]
        for search, totals in zip(searches, reached, strict=True)
    ]
    return torch.from_numpy(numpy.array(table)).permute(2, 0, 1).float()


def _read_search(path: Path) -> Array:
    """A layer's search, float64 [steps, 7], from nothing upwards."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                [float(row[name]) for name in PROJECTIONS]
                for row in csv.DictReader(file, skipinitialspace=True)
            ]
    except FileNotFoundError:
        raise MissingError(f"{path} is missing", hint="Copy the release again.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise TealError(f"{path} is damaged: {error}", hint="Copy the release again.") from None
    search = numpy.array([[0.0] * len(PROJECTIONS), *rows])
    rising = (numpy.diff(search, axis=0) >= 0).all()
    if not rows or not rising or not (search <= 1).all():
        raise TealError(f"{path} is damaged: its sparsities do not rise from 0 to at most 1")
    return search
