"""teal: training-free activation sparsity (TEAL) for local large language models.

`sparsify` and `unsparsify` do to a transformers model what the `teal` command does to its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from teal_cli.version import __version__

if TYPE_CHECKING:
    from teal_cli.sparsified import sparsify, unsparsify

__all__ = ["__version__", "sparsify", "unsparsify"]


def __getattr__(name: str) -> Any:
    """The Python interface; torch is imported when it is first used, not by `teal --help`."""
    if name in ("sparsify", "unsparsify"):
        from teal_cli import sparsified

        return getattr(sparsified, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
