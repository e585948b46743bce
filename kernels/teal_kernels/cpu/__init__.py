"""CPU kernels, compiled by numba: a projection that skips rows, and a whole decoding step."""

from teal_kernels.cpu.compiled import cache_problem
from teal_kernels.cpu.step import DecodeStep, sparse_project

__all__ = ["DecodeStep", "cache_problem", "sparse_project"]
