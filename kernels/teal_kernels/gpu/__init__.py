"""Triton kernels for CUDA devices; `reference` beside this package is their specification."""

from __future__ import annotations

from teal_kernels.gpu.choices import RowChoices
from teal_kernels.gpu.launch import Launch
from teal_kernels.gpu.step import DecodeStep
from teal_kernels.gpu.verify import VerifyStep

__all__ = ["DecodeStep", "Launch", "RowChoices", "VerifyStep"]
