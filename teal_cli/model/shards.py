"""Writes safetensors shards as a stream: one tensor in memory at a time, hashed on the way.

The safetensors library's own writers want every tensor of a file at once, which for a 4 GB shard
is 4 GB. The format is plain: the header's length (8 bytes, little-endian), the header (JSON),
the tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_WRITE_BYTES = 1 << 26
# A header is padded so that the first tensor starts on a cache line of the mapped file.
_ALIGNMENT = 64


class Stored(NamedTuple):
    """A tensor as it lies in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Digest(Protocol):
    """What hashlib's objects do."""

    def update(self, data: Any, /) -> None:
        """Add bytes."""


def plan_shards(tensors: Mapping[str, Stored], limit_bytes: int) -> dict[str, dict[str, Stored]]:
    """Divide tensors over files of at most `limit_bytes` (more only for one larger tensor).

    Returns:
        File name (model-0000i-of-0000n.safetensors) → its tensors, in order.
    """
    groups: list[dict[str, Stored]] = [{}]
    filled = 0
    for name, stored in tensors.items():
        if groups[-1] and filled + stored.nbytes > limit_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = stored
        filled += stored.nbytes
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_shard(
    path: Path,
    plan: Mapping[str, Stored],
    tensors: Iterable[Tensor],
    *,
    digest: Digest,
    progress: Callable[[int], None],
) -> None:
    """Write one safetensors file from tensors that come in the order of `plan`.

    `digest` takes in names and bytes; `progress` is called with each number of bytes written.
    """
    with path.open("wb") as file:
        file.write(_header(plan))
        for (name, stored), tensor in zip(plan.items(), tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == stored, name
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


def _header(plan: Mapping[str, Stored]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in plan.items():
        start, end = end, end + stored.nbytes
        entries[name] = {
            "dtype": _NAMES[stored.dtype],
            "shape": stored.shape,
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header
