"""The Triton kernels' tests, in Triton's interpreter on the CPU."""

from __future__ import annotations

from interpreted import run_interpreted


def test_the_step_in_the_interpreter() -> None:
    assert not run_interpreted("kernels/test_gpu_step.py")


def test_the_others_in_the_interpreter() -> None:
    files = ("test_gpu_dequantize.py", "test_gpu_linear.py", "test_gpu_verify.py")
    assert not run_interpreted(*(f"kernels/{name}" for name in files))
