"""Kernels of sparse decoding: each op in a Triton form, a CPU form and a plain torch reference.

The package knows tensors and nothing of models, commands or files.
"""

from __future__ import annotations

from teal_kernels.dispatch import BACKENDS, available_backends, sparse_project

__all__ = ["BACKENDS", "available_backends", "sparse_project"]
