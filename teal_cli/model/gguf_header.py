"""Reads the header of a GGUF file: its metadata, and where each tensor lies.

The gguf package's own reader takes 30 s for a vocabulary of 262,000 words, and follows whatever
a header claims. The format is small (ggml's docs/gguf.md): counts, then strings, numbers and
arrays of these. Nothing is read that the file is too short for, and no more than `_MOST_BYTES`.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.store.local import GGUF_MAGIC, open_regular

DAMAGED = "Download the file again."
OTHER_FORMAT = "Take another .gguf file of the model, such as Q4_K_M or Q8_0, or its safetensors."
_VERSIONS = (2, 3)
_MOST_BYTES = 1 << 28  # of a header; Gemma's vocabulary and templates take 15 MB
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32  # of the data, where the metadata name no other
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    **dict(enumerate(map(np.dtype, ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))),
    **dict(enumerate(map(np.dtype, ("<u8", "<i8", "<f8")), 10)),
}
# The least that an entry takes: a name's length, a kind and a value; the same and an offset.
_ENTRY_BYTES, _TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and how it is stored."""

    path: Path
    kind: Any  # gguf's GGMLQuantizationType
    shape: tuple[int, ...]  # GGUF's order, in_features first
    offset: int  # of its first byte in the file
    nbytes: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` as float32; a row is as long as the first dimension.

        Raises:
            TealError: the file ends before.
        """
        from gguf.quants import dequantize

        row_bytes = self.nbytes // math.prod(self.shape[1:])
        size = (stop - start) * row_bytes
        # By offset, not through a memory map: a file that another process cuts short would end
        # this one.
        raw = np.fromfile(self.path, np.uint8, size, offset=self.offset + start * row_bytes)
        if raw.nbytes != size:
            raise TealError(f"{self.path} has become shorter", hint=DAMAGED)
        return np.asarray(dequantize(raw.reshape(stop - start, -1), self.kind), np.float32)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata and the tensors of a GGUF file, by name.

    Raises:
        MissingError: there is no such file.
        TealError: it is no GGUF file, is damaged, or is truncated.
        UnsupportedError: it is of another version, or holds a format that gguf does not know.
    """
    if not path.exists():
        raise MissingError(f"no file {path}")
    with open_regular(path) as file:
        header = _Header(file, os.fstat(file.fileno()).st_size)
        try:
            return header.read(path)
        except (ValueError, OverflowError) as error:
            raise TealError(
                f"{path} is not a GGUF file, or is truncated: {error}", hint=DAMAGED
            ) from None


class _Header:
    """A header as it is read, from its first byte to its last."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._at = 0

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        """All of it; ValueError where it is damaged."""
        if self._take(4) != GGUF_MAGIC:
            raise ValueError("it begins otherwise")
        _check_version(path, self._number("<I"))
        tensor_count = self._count("<Q", _TENSOR_BYTES)
        metadata: dict[str, Any] = {}
        for _ in range(self._count("<Q", _ENTRY_BYTES)):
            name = self._string()
            if name in metadata:
                raise ValueError(f"it holds {name} twice")
            metadata[name] = self._value(self._number("<I"))
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {alignment!r}")
        start = self._at + -self._at % alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, number, offset in found:
            if name in tensors:
                raise ValueError(f"it holds {name} twice")
            tensors[name] = _stored(path, name, shape, number, start + offset)
            if tensors[name].offset + tensors[name].nbytes > self._size:
                raise ValueError("it ends too early")
        return metadata, tensors

    def _take(self, size: int) -> bytes:
        self._at += size
        if self._at > self._size:
            raise ValueError("it ends too early")
        if self._at > _MOST_BYTES:
            raise ValueError(f"its header is larger than {_MOST_BYTES >> 20} MB")
        taken = self._file.read(size)
        if len(taken) < size:  # it has become shorter
            raise ValueError("it ends too early")
        return taken

    def _number(self, form: str) -> int:
        number: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return number

    def _count(self, form: str, least_bytes: int) -> int:
        """How many things of at least so many bytes follow."""
        count = self._number(form)
        if count * least_bytes > self._size - self._at:
            raise ValueError("it ends too early")
        return count

    def _string(self) -> str:
        return self._take(self._number("<Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._number("<I"))
        return self._numbers(kind, 1)[0]

    def _array(self, kind: int) -> list[Any]:
        if kind == _STRING:
            return [self._string() for _ in range(self._count("<Q", 8))]
        if kind == _ARRAY:
            raise ValueError("it holds arrays of arrays")
        return self._numbers(kind, self._number("<Q"))

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise ValueError(f"a value of the unknown kind {kind}")
        numbers = np.frombuffer(self._take(count * _NUMBERS[kind].itemsize), _NUMBERS[kind])
        return list(numbers.tolist())

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, format and place among the data."""
        name, dimensions = self._string(), self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        return name, shape, self._number("<I"), self._number("<Q")


def _stored(
    path: Path, name: str, shape: tuple[int, ...], number: int, offset: int
) -> StoredTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise UnsupportedError(
            f"{path} holds tensors in a format that the gguf package does not know "
            f"(number {number})",
            hint=OTHER_FORMAT,
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[0] % block:
        raise ValueError(f"{name} has shape {list(shape)} in blocks of {block}")
    return StoredTensor(path, kind, shape, offset, math.prod(shape) // block * block_bytes)


def _check_version(path: Path, version: int) -> None:
    """Refuse what begins as GGUF does, but is of another version or byte order."""
    if version in _VERSIONS:
        return
    if version and version & 0xFFFF == 0:
        raise UnsupportedError(
            f"{path} is a big-endian GGUF file", hint="Take the little-endian file of the model."
        )
    raise UnsupportedError(
        f"{path} is of GGUF version {version}; teal reads {' and '.join(map(str, _VERSIONS))}",
        hint=OTHER_FORMAT,
    )
