"""Triton kernels for CUDA devices; `reference` beside this package is their specification."""

from __future__ import annotations

from teal_kernels.gpu.projection import sparse_project
from teal_kernels.gpu.step import DecodeStep
from teal_kernels.gpu.tensors import Geometry, LayerTensors

__all__ = ["DecodeStep", "Geometry", "LayerTensors", "sparse_project"]
