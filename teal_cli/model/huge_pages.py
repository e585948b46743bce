"""Weights in huge pages: a token reads all of them once, and walks few page tables for that.

The pages of a memory-mapped file are small ones on most file systems.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from teal_cli.environment import available_memory

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PAGE, _CHUNK = 2 << 20, 64 << 20
_LINE = 64  # tensors start at a cache line


def placing(device: str | torch.device, nbytes: int) -> Callable[[Tensor], Tensor]:
    """What copies tensors into huge pages; it gives them back as they are where that is no use.

    Args:
        device: they stay where they are unless it is a CPU.
        nbytes: of what stays in memory besides its copy, as a mapped file may: they stay where they
            are unless twice as many are free.
    """
    device = torch.device(device)
    try:
        known = "[never]" not in _SETTING.read_text(encoding="ascii")
    except OSError:  # not Linux
        known = False
    if device.type != "cpu" or not known or 2 * nbytes > (available_memory(device) or 0):
        return lambda tensor: tensor
    left = torch.empty(0, dtype=torch.uint8)

    def place(tensor: Tensor) -> Tensor:
        nonlocal left
        if tensor.nbytes > len(left):
            left = _chunk(max(_CHUNK, tensor.nbytes))
        copy = left[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        left = left[-(-tensor.nbytes // _LINE) * _LINE :]
        return copy.copy_(tensor)

    return place


def _chunk(nbytes: int) -> Tensor:
    """Bytes that start at a huge page; memory is taken as they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, nbytes + _PAGE, flags=flags)
    memory.madvise(mmap.MADV_HUGEPAGE)
    found = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory
    return found[-found.data_ptr() % _PAGE :]
