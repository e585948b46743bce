"""Vectors of recovery on a transformers model, as forward hooks of its projections and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from teal_kernels.tensors import RecoveryVectors
from torch import Tensor, nn

from teal_cli.model.sites import FUSED

# Which rows of a module's output stay dense: bool [B or 1, T, 1]; None: no row.
DenseRows = Callable[[], Tensor | None]


def register(
    model: nn.Module,
    layers: Sequence[nn.Module],
    vectors: RecoveryVectors,
    dense_rows: Sequence[DenseRows],
) -> list[Any]:
    """Add the biases and put the norms' weights in place, in rows that are not dense.

    Args:
        model: the module that has the final norm, `norm`.
        layers: its decoder layers, whose hooks of thresholds are there already.
        vectors: of this model.
        dense_rows: of each layer's present input.

    Returns:
        The hooks' handles.
    """
    handles: list[Any] = []
    for index, (layer, rows) in enumerate(zip(layers, dense_rows, strict=True)):
        for fused, names in FUSED.items():
            own = [module for name in names if (module := _projection(layer, name)) is not None]
            own = own or [_projection(layer, fused)]
            widths = [module.out_features for module in own]
            biases = getattr(vectors, fused)[index].split(widths)
            handles += [
                module.register_forward_hook(_Bias(bias, rows))
                for module, bias in zip(own, biases, strict=True)
            ]
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = layer.get_submodule(name)
            handles.append(norm.register_forward_hook(_Norm(getattr(vectors, name)[index], rows)))
    last = _Norm(vectors.norm, dense_rows[-1])
    return [*handles, model.get_submodule("norm").register_forward_hook(last)]


def _projection(layer: nn.Module, name: str) -> Any:
    block = "self_attn" if name in ("q", "k", "v", "o", "qkv") else "mlp"
    try:
        return layer.get_submodule(f"{block}.{name}_proj")
    except AttributeError:
        return None


class _Bias:
    def __init__(self, bias: Tensor, dense_rows: DenseRows) -> None:
        self._bias, self._dense_rows = bias, dense_rows

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _by_rows(output, output + self._bias.to(output), self._dense_rows())


class _Norm:
    """The norm again with another weight, by the module's own code."""

    def __init__(self, weight: Tensor, dense_rows: DenseRows) -> None:
        self._weight, self._dense_rows = weight, dense_rows

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        own = module.weight.data
        module.weight.data = self._weight.to(own)
        try:
            learnt = module.forward(*args)  # which calls no hooks
        finally:
            module.weight.data = own
        return _by_rows(output, learnt, self._dense_rows())


def _by_rows(dense: Tensor, sparse: Tensor, rows: Tensor | None) -> Tensor:
    return sparse if rows is None else torch.where(rows.to(dense.device), dense, sparse)
