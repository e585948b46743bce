"""One place that chooses which form of an op runs."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

from torch import Tensor

from teal_kernels import reference
from teal_kernels.quantized import QuantizedMatrix

# Backend → the module that holds it, and the device that it is for (None: any).
BACKENDS: dict[str, tuple[str, str | None]] = {
    "triton": ("teal_kernels.gpu", "cuda"),
    "numba": ("teal_kernels.cpu", "cpu"),
    "reference": ("teal_kernels.reference", None),
}


def sparse_project(
    x: Tensor,
    weight: Tensor | QuantizedMatrix,
    offsets: tuple[int, ...],
    thresholds: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Run `reference.sparse_project` in the fastest form that there is for the weight's device.

    Args:
        x: [K] floating point.
        weight: [K, N] floating point or quantized; one input channel is one contiguous row.
        offsets: P + 1 column bounds, from 0 to N.
        thresholds: [P] float32.
        bias: [N] floating point, or None.
        backend: a name from `BACKENDS`; None chooses by device.

    Returns:
        [N] in the dtype of x.

    Raises:
        ValueError: a shape, stride, dtype or device is not as above, or no such backend.
        ImportError: the backend that was asked for cannot be imported here.
    """
    if backend is None:
        module = _fastest(weight.device.type)
    elif backend in BACKENDS:
        module = importlib.import_module(BACKENDS[backend][0])
    else:
        raise ValueError(f"no backend {backend!r}; there are {', '.join(BACKENDS)}")
    result: Tensor = module.sparse_project(x, weight, offsets, thresholds, bias)
    return result


def available_backends(device_type: str) -> list[str]:
    """Names of the backends that work on "cuda" or "cpu" here, the fastest first."""
    return [
        name
        for name, (module, device) in BACKENDS.items()
        if device in (device_type, None) and _load(module)[0] is not None
    ]


@cache
def _fastest(device_type: str) -> ModuleType:
    """The module for a device; warns, once, when only plain torch is left."""
    for name, (module, device) in BACKENDS.items():
        if device == device_type:
            loaded, error = _load(module)
            if loaded is not None:
                return loaded
            warnings.warn(
                f"{name} cannot be used here ({error}): sparse decoding falls back to plain "
                "torch, which is slower than dense",
                RuntimeWarning,
                stacklevel=3,
            )
    return reference


@cache
def _load(module: str) -> tuple[ModuleType | None, str]:
    """Import a backend; (None, why) when that fails, in whatever way a broken install fails."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
