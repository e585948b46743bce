"""Tests of Triton kernels in Triton's interpreter, which is chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run_interpreted(*files: str) -> list[str]:
    """Run test files, named from tests/, in a process of their own; return what they skipped."""
    pytest.importorskip("triton")
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-rs"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    return [line for line in run.stdout.splitlines() if line.startswith("SKIPPED")]
