"""TEAL's thresholds on a transformers model, as forward pre-hooks of its projections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from teal_kernels.tensors import RecoveryVectors
from torch import Tensor, nn

from teal_cli import vector_hooks
from teal_cli.errors import TealError, UnsupportedError, UsageError
from teal_cli.model.sites import FUSED, PROJECTIONS
from teal_cli.sparsity.calibrate import SKIPPED_POSITIONS
from teal_cli.sparsity.profile import Profile

_HANDLES = "_teal_handles"  # the attribute of a sparsified model that holds its hooks' handles


def sparsify(
    model: nn.Module,
    profile: Profile | Path | str,
    sparsity: float,
    method: str | None = None,
    *,
    sparse_from: int = SKIPPED_POSITIONS,
    recover: bool = True,
) -> None:
    """Zero the small inputs of every projection of a transformers model, in place.

    TEAL (arXiv 2408.14690, eq. 1), on any device map, dtype and batch; abs(x) is compared in
    float32. It computes what a sparse kernel computes, and is no faster than the dense model. A
    model that is sparse already gets the new thresholds instead.

    Args:
        model: of a family that teal supports, with or without a head. Where q, k and v are one
            projection, or gate and up, each part of its outputs gets its own threshold.
        profile: a profile, its file, or the name of a model that `teal calibrate` has seen.
        sparsity: model-wide target in [0, 1).
        method: how to share it out, by default the profile's best.
        sparse_from: positions before this one stay dense, as in `teal eval`. A token's position
            is the model's `position_ids`: `generate` counts from the first token that is not
            padding, a plain call from the cache's length.
        recover: use the vectors of `teal calibrate --recover`, where the profile has them.

    Raises:
        UnsupportedError: the model has no q, k, v, o, gate, up and down projections.
        TealError: the profile is for a model of another shape.
        MissingError: there is no such profile.
        UsageError: the sparsity is out of range, or the profile has no such method.
    """
    if not isinstance(profile, Profile):
        profile = _find(profile)
    _check_shape(profile, model)
    setting = profile.setting(sparsity, method, recover=recover)
    assert setting.thresholds is not None
    put_thresholds(model, setting.thresholds, sparse_from=sparse_from, vectors=setting.vectors)


def put_thresholds(
    model: nn.Module,
    thresholds: Tensor,
    *,
    sparse_from: int,
    vectors: RecoveryVectors | None = None,
) -> None:
    """What `sparsify` does, with the thresholds and vectors themselves.

    Args:
        model: as there.
        thresholds: float32 [num_hidden_layers, 7]; a channel is kept where abs(x) is above.
        sparse_from: as there.
        vectors: of this model.

    Raises:
        UnsupportedError: the model has no q, k, v, o, gate, up and down projections.
    """
    layers = _decoder_layers(model)
    modules = [_projections(layer) for layer in layers]
    unsparsify(model)
    handles: list[Any] = []
    dense_rows = []
    for layer, projections, levels in zip(layers, modules, thresholds.tolist(), strict=True):
        rows = _DenseRows(sparse_from)
        dense_rows.append(lambda rows=rows: rows.mask)
        if sparse_from > 0:
            handles.append(layer.register_forward_pre_hook(rows, with_kwargs=True))
        for module, widths in projections:
            own, levels = levels[: len(widths)], levels[len(widths) :]
            if len(widths) == 1:
                handles.append(module.register_forward_pre_hook(_Threshold(own[0], rows)))
            else:
                handles.append(module.register_forward_hook(_Thresholds(own, widths, rows)))
    if vectors is not None:
        base = getattr(model, "model", model)
        base = getattr(base, "language_model", base)
        handles += vector_hooks.register(base, layers, vectors, dense_rows)
    setattr(model, _HANDLES, handles)


def unsparsify(model: nn.Module) -> None:
    """Make a sparsified model dense again; a dense one stays as it is."""
    for handle in getattr(model, _HANDLES, ()):
        handle.remove()
    if hasattr(model, _HANDLES):
        delattr(model, _HANDLES)


class _DenseRows:
    """Pre-hook of a decoder layer: which of the rows that it is given stay dense."""

    def __init__(self, sparse_from: int) -> None:
        self._sparse_from = sparse_from
        self.mask: Tensor | None = None  # bool [B or 1, T, 1]; None: no row

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        if positions is None:
            raise UsageError(
                f"{type(module).__name__} is given no position_ids: use sparsify(sparse_from=0)"
            )
        self.mask = (positions < self._sparse_from)[..., None]


class _Threshold:
    """Pre-hook of a projection: x with its small channels zeroed, but not in the dense rows."""

    def __init__(self, level: float, rows: _DenseRows) -> None:
        # A Python number: it has no device, so that x may be on any.
        self._level = level
        self._rows = rows

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.applied(args[0]), *args[1:])

    def applied(self, x: Tensor) -> Tensor:
        """x with its small channels zeroed."""
        drop = x.abs().float() <= self._level
        if self._rows.mask is not None:
            drop &= ~self._rows.mask.to(x.device)
        return torch.where(drop, 0, x)


class _Thresholds:
    """Hook of several projections in one module: the outputs of each from its own sparse input."""

    def __init__(self, levels: Sequence[float], widths: Sequence[int], rows: _DenseRows) -> None:
        self._thresholds = [_Threshold(level, rows) for level in levels]
        self._ends = list(accumulate(widths))

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        starts = [0, *self._ends]
        parts = zip(self._thresholds, starts, self._ends, strict=False)
        # forward() itself, which calls no hooks, works for a quantized module as well.
        return torch.cat(
            [module.forward(own.applied(args[0]))[..., a:b] for own, a, b in parts], dim=-1
        )


def _find(name: Path | str) -> Profile:
    """The profile in a file, or of a model by its name."""
    path = Path(name)
    if path.suffix == ".safetensors":
        return Profile.load(path)
    from teal_cli import pipeline
    from teal_cli.store import models

    return pipeline.stored_profile(models.resolve(str(name)))[0]


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    base = getattr(model, "model", model)
    layers = getattr(getattr(base, "language_model", base), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedError(f"{type(model).__name__} has no decoder layers that teal knows")
    return list(layers)


def _projections(layer: nn.Module) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """A layer's modules in PROJECTIONS order, with the outputs of each projection in them."""
    o = _linear(layer, "o")
    found: list[tuple[nn.Module, tuple[int, ...]]] = []
    for fused, names in FUSED.items():
        module = _linear(layer, fused, optional=True) if len(names) > 1 else None
        if module is None:
            found += [(each, (each.out_features,)) for each in (_linear(layer, n) for n in names)]
        elif fused == "qkv":
            kv = (module.out_features - o.in_features) // 2
            found.append((module, (o.in_features, kv, kv)))
        else:
            found.append((module, (module.out_features // 2,) * 2))
    return found


def _linear(layer: nn.Module, name: str, *, optional: bool = False) -> Any:
    path = f"{'self_attn' if name in ('q', 'k', 'v', 'o', 'qkv') else 'mlp'}.{name}_proj"
    try:
        module = layer.get_submodule(path)
    except AttributeError:
        if optional:
            return None
        raise UnsupportedError(
            f"{type(layer).__name__} has no module {path}: teal needs the "
            f"{', '.join(PROJECTIONS)} projections, not repacked"
        ) from None
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        raise UnsupportedError(f"{path} is a {type(module).__name__}, not a linear layer")
    return module


def _check_shape(profile: Profile, model: nn.Module) -> None:
    layers = _decoder_layers(model)
    shapes = {
        tuple((m.in_features, width) for m, widths in _projections(layer) for width in widths)
        for layer in layers
    }
    if len(layers) != profile.shape.num_hidden_layers or shapes != {profile.shape.projections}:
        raise TealError(
            f"the profile of {profile.model} is for a model of another shape than this "
            f"{type(model).__name__}",
            hint="Make one for this model with: teal calibrate",
        )
