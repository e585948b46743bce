"""What compiled functions are made of: other functions, which nobody calls from Python.

numba takes each function that another one calls for a program of its own: it is optimised and
turned to machine code with all that it calls, at every level of calls anew, and gets an entry from
Python. Here it stays as it was written until the whole is optimised. So compiling a decoding step
and prefill takes 15 to 25 s of a core instead of 45 to 60 (Sapphire Rapids), and they are as fast.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.extending import overload


class _NoEngine:
    """In the place of what runs code: it has no environment of a fragment that it could set."""

    def set_env(self, env_name: str, env: Any) -> None:
        """Do nothing: environments are for Python's objects, which no fragment has."""


class _Fragment(JITCodeLibrary):
    """The code of one function, and what is linked to it, all of it as numba wrote it."""

    codegen = _NoEngine()

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """0: there is none that Python could call."""
        self._ensure_finalized()
        return 0


class _Compiler(Compiler):
    def __init__(self, typingctx: Any, targetctx: Any, library: Any, *rest: Any) -> None:
        library = _Fragment(targetctx.codegen(), "fragment")
        super().__init__(typingctx, targetctx, library, *rest)


# Division as in numpy: Python's, which raises, would keep loops from being vectorised. Arrays are
# the caller's, and nobody counts their users: numba would, with atomic operations whenever it
# passes one on, and two threads that share one would wait for each other's.
OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}
FRAGMENT = OPTIONS | {
    "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _Compiler
}  # fmt: skip

compiled = njit(**FRAGMENT)
overloaded = partial(overload, jit_options=FRAGMENT)
