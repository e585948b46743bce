"""The Triton kernels' tests, in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = (
    "test_gpu.py",
    "test_gpu_dequantize.py",
    "test_gpu_step.py",
    "test_gpu_sample.py",
    "../inference/test_stream.py",
)


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *FILES],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    skipped = [line for line in run.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) == 1, skipped  # the test that needs 12 GB of device memory
