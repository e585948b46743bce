"""Reads a GGUF file's metadata and tensors, these dequantised one at a time.

The gguf package knows the format and its quantizations. Tensors are read by offset rather than
through its memory map, so that the pages of a big file don't pile up in this process.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.model.hf_folder import to_finite
from teal_cli.store.local import GGUF_MAGIC, gguf_parts

DAMAGED = "Download the file again."
_OTHER_FORMAT = "Take another .gguf file of the model, such as Q4_K_M or Q8_0, or its safetensors."
_VERSIONS = (2, 3)
_CHUNK_ELEMENTS = 1 << 22  # dequantised at a time, in float32: 16 MB


class GgufTensors:
    """The content of a GGUF file, or of all parts of a split one, under GGUF's names.

    `tensors` are the gguf package's descriptions.

    Raises:
        MissingError: there is no such file, or a part is missing.
        TealError: it is no GGUF file, is truncated, or a part belongs to another model.
        UnsupportedError: it is of another version, or a tensor's format cannot be dequantised.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, self._part_of, self.metadata = _open_parts(path)
        kinds = {tensor.tensor_type: name for name, tensor in self.tensors.items()}
        for kind, name in kinds.items():
            if not _is_readable(kind):
                raise UnsupportedError(
                    f"{name} of {path} is stored as {kind.name}, which the gguf package cannot "
                    "dequantise",
                    hint=_OTHER_FORMAT,
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, [out_features, in_features]: GGUF's own order is the other one."""
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor, dequantised, in `dtype`.

        Raises:
            TealError: the file ends early, or holds what is not finite or `dtype` cannot hold.
        """
        from gguf.quants import dequantize

        stored, shape = self.tensors[name], self.shape(name)
        rows, row_length = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
        row_bytes = stored.n_bytes // rows
        step = max(1, _CHUNK_ELEMENTS // row_length)
        out = torch.empty(rows, row_length, dtype=dtype)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            raw = np.fromfile(
                self._part_of[name],
                dtype=np.uint8,
                count=(stop - start) * row_bytes,
                offset=stored.data_offset + start * row_bytes,
            )
            if raw.nbytes != (stop - start) * row_bytes:
                raise TealError(f"{self._part_of[name]} is truncated at {name}", hint=DAMAGED)
            raw = raw.view(stored.data.dtype).reshape(stop - start, -1)
            values = dequantize(raw, stored.tensor_type)
            chunk = torch.from_numpy(np.array(values, dtype=np.float32))
            out[start:stop] = to_finite(chunk, dtype, name, str(self.path))
        return out.reshape(shape)


def _open_parts(path: Path) -> tuple[dict[str, Any], dict[str, Path], dict[str, Any]]:
    """Descriptions of a model's tensors, the file that holds each, and the first part's metadata.

    Raises:
        MissingError: a part is not there.
        TealError: a file is damaged, or belongs to another model.
        UnsupportedError: a file is in a format that is not read.
    """
    parts = gguf_parts(path)
    tensors: dict[str, Any] = {}
    part_of: dict[str, Path] = {}
    metadata: dict[str, Any] = {}
    for number, part in enumerate(parts):
        found, own = _open(part)
        count = own.get("split.count", 0) or 1
        if count != len(parts) and len(parts) == 1:
            raise UnsupportedError(
                f"{path} is one of {count} parts of a model, and is not named so",
                hint=f"Name all as gguf-split does: {path.stem}-00001-of-00002.gguf and so on.",
            )
        metadata = metadata or own
        same = own.get("split.tensors.count") == metadata.get("split.tensors.count")
        if (own.get("split.no", 0), count) != (number, len(parts)) or not same:
            raise TealError(f"{part} is not part {number + 1} of this model", hint=DAMAGED)
        if twice := found.keys() & tensors.keys():
            raise TealError(f"{part} holds {min(twice)}, which an earlier part holds too")
        tensors |= found
        part_of |= dict.fromkeys(found, part)
    total = metadata.get("split.tensors.count", len(tensors)) if len(parts) > 1 else len(tensors)
    if total != len(tensors):
        raise TealError(
            f"the parts of {path} hold {len(tensors)} tensors, not {total}: they are of several "
            "models",
            hint=DAMAGED,
        )
    return tensors, part_of, metadata


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Descriptions of the tensors (data still on disk) and the metadata, by name."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """The package's reader, but it stops where the file does: its arrays could be endless."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **named: Any) -> Any:
            values = super()._get(offset, dtype, count, *order, **named)
            if len(values) < count:
                raise ValueError("it ends too early")
            return values

    if not path.is_file():
        raise MissingError(f"no file {path}")
    _check_version(path)
    try:
        reader = Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
        if unknown := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error)):
            raise UnsupportedError(
                f"{path} holds tensors in a format that the gguf package does not know "
                f"(number {unknown[1]})",
                hint=_OTHER_FORMAT,
            ) from None
        raise TealError(
            f"{path} is not a GGUF file, or is truncated: {error}", hint=DAMAGED
        ) from None
    return tensors, metadata


def _check_version(path: Path) -> None:
    """Refuse what begins as GGUF does, but is of another version or byte order."""
    with path.open("rb") as file:
        head = file.read(8)
    version = int.from_bytes(head[4:], "little")
    if head[:4] != GGUF_MAGIC or len(head) < 8 or version in _VERSIONS:
        return
    if version and version & 0xFFFF == 0:
        raise UnsupportedError(
            f"{path} is a big-endian GGUF file", hint="Take the little-endian file of the model."
        )
    raise UnsupportedError(
        f"{path} is of GGUF version {version}; teal reads {' and '.join(map(str, _VERSIONS))}",
        hint=_OTHER_FORMAT,
    )


def _is_readable(kind: Any) -> bool:
    """Whether the gguf package can dequantise a format: it has one block of zeros to do."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True
