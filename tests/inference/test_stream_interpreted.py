"""Choosing tokens on the device, and the answers that come of it, in Triton's interpreter."""

from __future__ import annotations

from interpreted import run_interpreted


def test_in_the_interpreter() -> None:
    assert not run_interpreted("kernels/test_gpu_sample.py", "inference/test_stream.py")


def test_drafts_in_the_interpreter() -> None:
    assert not run_interpreted("inference/test_drafting_device.py")
