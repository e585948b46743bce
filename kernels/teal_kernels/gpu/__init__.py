"""Triton kernels for CUDA devices; `reference` beside this package is their specification."""

from __future__ import annotations

from teal_kernels.gpu.projection import sparse_project
from teal_kernels.gpu.step import DecodeStep

__all__ = ["DecodeStep", "sparse_project"]
