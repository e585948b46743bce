"""CPU kernels, compiled by numba: a whole decoding step, prefill, and projections on their own."""

from teal_kernels.cpu.compiled import cache_problem
from teal_kernels.cpu.prefill import Prefill, is_compiled
from teal_kernels.cpu.step import DecodeStep, Projection

__all__ = ["DecodeStep", "Prefill", "Projection", "cache_problem", "is_compiled"]
