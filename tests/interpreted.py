"""Tests of Triton kernels in Triton's interpreter, which is chosen before Triton is imported."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def patch_helpers_once() -> None:
    """Have Triton's interpreter put its own functions into a helper's language once.

    It does so at every call of a helper, although the kernel's launch has done it, and takes a
    third of all its time for that.
    """
    from triton.runtime import interpreter

    patch = functools.cache(interpreter._patch_lang)

    def call(helper: Any, *args: Any, **kwargs: Any) -> Any:
        patch(helper.fn)
        return helper.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
