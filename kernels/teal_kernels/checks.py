"""What every form of an op asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from teal_kernels.quantized import QuantizedMatrix

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_projection(
    x: Tensor,
    weight: Tensor | QuantizedMatrix,
    offsets: tuple[int, ...],
    thresholds: Tensor,
    bias: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments are those of `reference.sparse_project`."""
    floats = weight if isinstance(weight, Tensor) else None  # the quantized check themselves
    if floats is not None and (floats.ndim != 2 or floats.stride(1) != 1):
        raise ValueError(
            "weight must be [in_features, out_features] with contiguous rows, "
            f"got shape {tuple(floats.shape)} with strides {floats.stride()}"
        )
    inputs, outputs = weight.shape
    _check_vector("x", x, inputs)
    _check_vector("thresholds", thresholds, len(offsets) - 1)
    if bias is not None:
        _check_vector("bias", bias, outputs)
    if offsets[0] != 0 or offsets[-1] != outputs or list(offsets) != sorted(offsets):
        raise ValueError(f"offsets must rise from 0 to {outputs} columns, got {offsets}")
    if thresholds.dtype != torch.float32:
        raise ValueError(f"thresholds must be float32, got {thresholds.dtype}")
    for name, tensor in (("x", x), ("weight", floats), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    devices = {t.device for t in (x, weight, thresholds, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}")


def _check_vector(name: str, tensor: Tensor, length: int) -> None:
    if tuple(tensor.shape) != (length,):
        raise ValueError(f"{name} must be [{length}], got shape {tuple(tensor.shape)}")
