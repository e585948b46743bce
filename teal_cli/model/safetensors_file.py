"""Reads a safetensors file by offset: what its header says, and one tensor at a time.

The safetensors library maps a file into memory. A source that another process cuts short would
then end this one, by a signal that nothing can catch, and its pages would pile up here.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.config import DAMAGED
from teal_cli.store.local import open_regular

_MOST_BYTES = 100_000_000  # of a header, as the library has it
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and how it is stored."""

    path: Path
    dtype: str  # the format's word
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    nbytes: int

    def read(self) -> Tensor:
        """All of it."""
        return self._read(self.offset, self.nbytes).reshape(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """A matrix's rows from `start` up to `stop`, or up to its last one."""
        rows, row_bytes = self.shape[0], self.nbytes // self.shape[0]
        count = min(stop, rows) - start
        values = self._read(self.offset + start * row_bytes, count * row_bytes)
        return values.reshape(count, *self.shape[1:])

    def _read(self, offset: int, nbytes: int) -> Tensor:
        """The values in a part of the file.

        Raises:
            TealError: the file cannot be read, or has become shorter.
            UnsupportedError: torch has no such dtype.
        """
        if self.dtype not in _DTYPES:
            raise UnsupportedError(f"{self.path} holds a tensor of the unknown dtype {self.dtype}")
        try:
            content = np.fromfile(self.path, np.uint8, nbytes, offset=offset)
        except OSError as error:
            raise TealError(f"{self.path} cannot be read: {error}", hint=DAMAGED) from None
        if content.nbytes != nbytes:
            raise TealError(f"{self.path} has become shorter", hint=DAMAGED)
        return torch.from_numpy(content).view(_DTYPES[self.dtype])


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        TealError: it is no safetensors file, is damaged, or is truncated.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MOST_BYTES, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(file.read(length).decode())
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        start = 8 + length
        tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
        _check_places(tensors, start, size)
    except (OSError, ValueError, RecursionError) as error:
        raise TealError(f"{path} is truncated or damaged: {error}", hint=DAMAGED) from None
    return tensors


def _tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """What a header says of a tensor; ValueError where that is nonsense."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise ValueError(f"no dtype of {name!r}")
    shape, (begin, end) = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    nbytes = end - begin
    dtype = _DTYPES.get(entry["dtype"])
    if nbytes < 0 or (dtype is not None and nbytes != math.prod(shape) * dtype.itemsize):
        raise ValueError(f"{name!r} has shape {shape} in {nbytes:,} bytes")
    return StoredTensor(path, entry["dtype"], tuple(shape), start + begin, nbytes)


def _sizes(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
        raise ValueError(f"sizes that are none: {value!r}")
    return value


def _check_places(tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    """Tensors lie one behind the other and fill the file."""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != start:
            raise ValueError("its tensors overlap, or leave gaps")
        start += tensor.nbytes
    if start != size:
        raise ValueError(f"{start:,} bytes are described, and {size:,} are there")
