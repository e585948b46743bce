"""The Triton kernels' tests, in Triton's interpreter on the CPU."""

from __future__ import annotations

from interpreted import run_interpreted


def test_projections_in_the_interpreter() -> None:
    skipped = run_interpreted("kernels/test_gpu.py", "kernels/test_gpu_dequantize.py")
    assert len(skipped) == 1, skipped  # the test that needs 12 GB of device memory


def test_the_step_in_the_interpreter() -> None:
    assert not run_interpreted("kernels/test_gpu_step.py")
