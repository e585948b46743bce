"""The Triton kernels' tests, in Triton's interpreter on the CPU."""

from __future__ import annotations

from interpreted import run_interpreted


def test_dequantizing_in_the_interpreter() -> None:
    assert not run_interpreted("kernels/test_gpu_dequantize.py")


def test_the_step_in_the_interpreter() -> None:
    assert not run_interpreted("kernels/test_gpu_step.py")


def test_the_step_for_several_tokens_in_the_interpreter() -> None:
    assert not run_interpreted("kernels/test_gpu_verify.py")


def test_a_projection_that_stands_alone_in_the_interpreter() -> None:
    assert not run_interpreted("kernels/test_gpu_linear.py")
