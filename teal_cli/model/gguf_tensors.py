"""Reads a GGUF file's metadata and tensors, these dequantised one at a time.

The gguf package knows the quantizations. Tensors are read by offset rather than through a memory
map, so that the pages of a big file don't pile up in this process.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.gguf_header import DAMAGED, OTHER_FORMAT, StoredTensor, read_header
from teal_cli.model.hf_folder import to_finite
from teal_cli.store.local import gguf_parts

_CHUNK_ELEMENTS = 1 << 22  # dequantised at a time, in float32: 16 MB


class GgufTensors:
    """The content of a GGUF file, or of all parts of a split one, under GGUF's names.

    Raises:
        MissingError: there is no such file, or a part is missing.
        TealError: it is no GGUF file, is truncated, or a part belongs to another model.
        UnsupportedError: it is of another version, or a tensor's format cannot be dequantised.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, self.tensors = _open_parts(path)
        kinds = {tensor.kind: name for name, tensor in self.tensors.items()}
        for kind, name in kinds.items():
            if not _is_readable(kind):
                raise UnsupportedError(
                    f"{name} of {path} is stored as {kind.name}, which the gguf package cannot "
                    "dequantise",
                    hint=OTHER_FORMAT,
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, [out_features, in_features]: GGUF's own order is the other one."""
        return self.tensors[name].shape[::-1]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor, dequantised, in `dtype`.

        Raises:
            TealError: the file ends early, or holds what is not finite or `dtype` cannot hold.
        """
        stored, shape = self.tensors[name], self.shape(name)
        row_length, rows = stored.shape[0], math.prod(stored.shape[1:])
        step = max(1, _CHUNK_ELEMENTS // row_length)
        out = torch.empty(rows, row_length, dtype=dtype)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            chunk = torch.from_numpy(stored.read(start, stop).copy())
            out[start:stop] = to_finite(chunk, dtype, name, str(self.path))
        return out.reshape(shape)


def _open_parts(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The first part's metadata, and the tensors of all parts.

    Raises:
        MissingError: a part is not there.
        TealError: a file is damaged, or belongs to another model.
        UnsupportedError: a file is in a format that is not read.
    """
    parts = gguf_parts(path)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, Any] = {}
    for number, part in enumerate(parts):
        own, found = read_header(part)
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
    total = metadata.get("split.tensors.count", len(tensors)) if len(parts) > 1 else len(tensors)
    if total != len(tensors):
        raise TealError(
            f"the parts of {path} hold {len(tensors)} tensors, not {total}: they are of several "
            "models",
            hint=DAMAGED,
        )
    return metadata, tensors


def _is_readable(kind: Any) -> bool:
    """Whether the gguf package can dequantise a format: it has one block of zeros to do."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True
