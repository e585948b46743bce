"""CPU kernels, compiled by numba: a whole decoding step, and its projections on their own."""

from teal_kernels.cpu.compiled import cache_problem
from teal_kernels.cpu.step import DecodeStep, Projection

__all__ = ["DecodeStep", "Projection", "cache_problem"]
