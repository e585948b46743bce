"""Tests of Triton kernels in Triton's interpreter, which is chosen before Triton is imported."""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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


def lighten_interpreter() -> None:
    """Have Triton's interpreter do once what it does at every call, and check sums by numpy.

    It puts its own functions into the language at each launch and at each call of a helper. Whether
    integers overflow it works out by a dozen of its operations for each one, and then says nothing.
    """
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch = functools.cache(interpreter._patch_lang)
    nothing_to_restore = SimpleNamespace(restore=lambda: None)

    def patch_for_good(function: Any) -> Any:
        patch(function)
        return nothing_to_restore

    def call(helper: Any, *args: Any, **kwargs: Any) -> Any:
        patch(helper.fn)
        return helper.rewrite()(*args, **kwargs)

    def refuse_overflow(_: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        of = lhs.type.scalar
        if of.is_int_signed() and of.int_bitwidth < 64:  # unsigned ones may wrap
            both = (operand.handle.data.astype(np.int64) for operand in (lhs, rhs))
            exact = getattr(operator, operation.__name__)(*both)
            fits = of.get_int_min_value() <= exact.min() and exact.max() <= of.get_int_max_value()
            assert fits, f"{of} overflows in {operation.__name__}"

    interpreter._patch_lang = patch_for_good
    interpreter.InterpretedFunction.__call__ = call
    TritonSemantic.binary_op_sanitize_overflow_impl = refuse_overflow
