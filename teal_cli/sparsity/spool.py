"""Where hidden states wait between layers: in memory, or on disk to resume from.

On disk two files take turns: a layer reads one and writes the other. The state file, written
last and atomically, says which layer comes next, so a killed run redoes at most one layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from teal_cli.store import artifacts


class States(Protocol):
    """The inputs of one layer, [T, hidden_size] a window, and the counts of the layers before."""

    def resume(self) -> Tensor | None:
        """The counts of the layers that are done, int64 [layers, 4, BINS]; None if none is."""

    def read(self, layer: int) -> Iterator[Tensor]:
        """The inputs of a layer."""

    def write(self, layer: int, inputs: Iterable[Tensor]) -> None:
        """Keep the inputs of a layer; those of the layer before are read meanwhile."""

    def finish_layer(self, counts: Tensor) -> None:
        """Record the counts of all layers up to the one whose outputs were just written."""


class MemoryStates:
    """Hidden states in memory: for few windows, with nothing to resume."""

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []

    def resume(self) -> Tensor | None:
        return None

    def read(self, layer: int) -> Iterator[Tensor]:
        return iter(self._inputs)

    def write(self, layer: int, inputs: Iterable[Tensor]) -> None:
        self._inputs = list(inputs)

    def finish_layer(self, counts: Tensor) -> None:
        pass


class DiskStates:
    """Hidden states in a folder.

    Args:
        folder: made if it is not there.
        key: names what the run depends on; what another key left behind is ignored.
        like: hidden states of any window, for their shape, dtype and device.
        count: how many windows there are.

    Raises:
        TealError: the disk has no room for them.
    """

    def __init__(self, folder: Path, *, key: str, like: Tensor, count: int) -> None:
        self._folder, self._key, self._like, self._count = folder, key, like, count
        folder.mkdir(parents=True, exist_ok=True)
        if self.resume() is None:
            artifacts.check_free_space(folder, 2 * count * like.nbytes)

    def resume(self) -> Tensor | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._state, framework="pt") as file:
                if (file.metadata() or {}).get("key") != self._key:
                    return None
                counts = file.get_tensor("counts")
            complete = self._file(len(counts)).stat().st_size == self._count * self._like.nbytes
        except (OSError, SafetensorError):
            return None
        return counts if complete else None

    def read(self, layer: int) -> Iterator[Tensor]:
        like = self._like
        with self._file(layer).open("rb") as file:
            for _ in range(self._count):
                content = bytearray(file.read(like.nbytes))
                yield torch.frombuffer(content, dtype=like.dtype).view(like.shape).to(like.device)

    def write(self, layer: int, inputs: Iterable[Tensor]) -> None:
        with self._file(layer).open("wb") as file:
            for hidden in inputs:
                file.write(hidden.contiguous().cpu().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def finish_layer(self, counts: Tensor) -> None:
        from safetensors.torch import save

        content = save({"counts": counts.contiguous()}, metadata={"key": self._key})
        artifacts.atomic_write(self._state, content)

    @property
    def _state(self) -> Path:
        return self._folder / "state.safetensors"

    def _file(self, layer: int) -> Path:
        return self._folder / f"hidden-{layer % 2}.bin"
