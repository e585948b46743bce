"""Writes safetensors shards as a stream: one tensor in memory at a time, hashed on the way.

The safetensors library's own writers want every tensor of a file at once, which for a 4 GB shard
is 4 GB. The format is plain: the header's length (8 bytes, little-endian), the header (JSON),
the tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_WRITE_BYTES = 1 << 26
# A header is padded so that the first tensor starts on a cache line of the mapped file.
_ALIGNMENT = 64


class Digest(Protocol):
    """What hashlib's objects do."""

    def update(self, data: Any, /) -> None:
        """Add bytes."""


def plan_shards(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, limit_bytes: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Divide tensors over files of at most `limit_bytes` (more only for one larger tensor).

    Returns:
        File name (model-0000i-of-0000n.safetensors) → the shapes of its tensors, in order.
    """
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > limit_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_shard(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[Tensor],
    *,
    digest: Digest,
    progress: Callable[[int], None],
) -> None:
    """Write one safetensors file from tensors that come in the order of `shapes`.

    `digest` takes in names and bytes; `progress` is called with each number of bytes written.
    """
    with path.open("wb") as file:
        file.write(_header(shapes, dtype))
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tuple(tensor.shape) == shape, name
            assert tensor.dtype == dtype, name
            digest.update(name.encode())
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, content.nbytes, _WRITE_BYTES):
                piece = content[start : start + _WRITE_BYTES]
                digest.update(piece)
                file.write(piece)
                progress(piece.nbytes)
            del tensor, content
        file.flush()
        os.fsync(file.fileno())


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header
