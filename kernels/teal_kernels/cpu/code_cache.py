"""Compiled functions kept on disk, by numba's cache, which trusts whatever it finds there."""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.registry import cpu_target

_DIGEST_BYTES = 32


class CodeCache(FunctionCache):
    """The cache of one function. What cannot be used is removed, and compiled and stored anew."""

    def __init__(self, function: Any) -> None:
        """Find the place; RuntimeError where there is none that can be written to."""
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _CheckedFiles(self._cache_path, self._impl.filename_base, stamp)
        self.problem: str | None = None  # why what was compiled is not kept

    def holds(self, kind: Any) -> bool:
        """Whether code is kept, for this CPU, that takes a value of numba's type `kind`."""
        try:
            kept = self._cache_file._load_index()
        except Exception:  # damaged, or of another version: it will be removed
            return False
        cpu = cpu_target.target_context.codegen().magic_tuple()
        return any(kind in signature and made_for == cpu for signature, made_for, _ in kept)

    def _load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super()._load_overload(sig, target_context)
        except Exception:  # whatever a damaged pickle or another version's raises
            for path in Path(self._cache_path).glob(f"{self._impl.filename_base}.*"):
                try:
                    path.unlink()
                except OSError as error:
                    self._explain(error)
            return None

    def _save_overload(self, sig: Any, data: Any) -> None:
        try:
            super()._save_overload(sig, data)
        except Exception as error:
            self._explain(error)

    def _explain(self, error: Exception) -> None:
        why = getattr(error, "strerror", None) or error
        self.problem = (
            f"the compiled kernels cannot be kept in {self._cache_path} ({why}), and are compiled "
            "anew each time; remove the folder, or choose another with NUMBA_CACHE_DIR"
        )


class _CheckedFiles(IndexDataCacheFile):
    """numba's index and data files, each behind the SHA-256 of its content.

    A flipped bit in machine code would be run; a pickle of another user would be, too.
    """

    def _load_index(self) -> dict[Any, str]:
        try:
            made_by, overloads = _read(self._index_path)
        except FileNotFoundError:
            return {}
        return dict(overloads) if made_by == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._write(self._index_path, ((self._version, self._source_stamp), overloads))

    def _load_data(self, name: str) -> Any:
        return _read(self._data_path(name))

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), data)

    def _write(self, path: str, value: Any) -> None:
        content = self._dump(value)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(content).digest() + content)


def _read(path: str) -> Any:
    """What a file holds; ValueError where it is not whole, or not ours."""
    # A pipe in the file's place would be waited for.
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no file")
        if hasattr(os, "geteuid") and status.st_uid not in (0, os.geteuid()):
            raise ValueError(f"{path} belongs to another user")
        content = file.read()
    if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
        raise ValueError(f"{path} is damaged")
    return pickle.loads(content[_DIGEST_BYTES:])


def check_cpu() -> None:
    """Refuse what LLVM would end the process over.

    Raises:
        RuntimeError: an x86 without F16C, as before 2012, has no conversion of float16, and LLVM
            calls a function for it that is not there.
    """
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    if triple.startswith(("x86_64", "i386", "i686")) and "+f16c" not in features.split(","):
        raise RuntimeError("this CPU does not convert float16: it has no F16C")
