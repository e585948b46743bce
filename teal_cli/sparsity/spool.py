"""Windows through a model one layer at a time, resumable at any layer.

On disk two files take turns: a step reads one and writes the other. The state file, written last
and atomically, says which step comes next, so a killed run redoes at most one step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from teal_cli.progress import Reporter
from teal_cli.store import artifacts


class States(Protocol):
    """What a step reads, [T, hidden_size] a window, and what the steps before it found."""

    def resume(self) -> Tensor | None:
        """What the steps that are done found, [steps, ...]; None if none is."""

    def read(self, step: int) -> Iterator[Tensor]:
        """The inputs of a step."""

    def write(self, step: int, inputs: Iterable[Tensor]) -> None:
        """Keep the inputs of a step; those of the step before are read meanwhile."""

    def finish(self, found: Tensor) -> None:
        """Record what all steps up to the one whose outputs were just written found."""


def sweep(
    found: Tensor,
    states: States,
    start: Callable[[], Iterable[Tensor]],
    visit: Callable[[int, Iterable[Tensor], Tensor], Iterator[Tensor]],
    *,
    label: str,
    reporter: Reporter,
) -> Tensor:
    """Pass windows through every step in turn, each step's outputs being the next one's inputs.

    Args:
        found: zeros [steps, ...], filled here.
        states: where the outputs wait, and what an earlier run left.
        start: the inputs of the first step.
        visit: (step, inputs, found[step]) yields a step's outputs and adds to what it found.
        label: names the work.
        reporter: follows the steps.

    Returns:
        `found`.
    """
    steps = len(found)
    done = states.resume()
    first = 0 if done is None else len(done)
    if done is not None:
        found[:first] = done
        if first == steps:
            reporter.skip()
            return found
        reporter.note(f"resuming at layer {first + 1} of {steps}")
    with reporter.task(label, total=steps, unit="layers") as task:
        task.advance(first)
        for step in range(first, steps):
            inputs = start() if step == 0 else states.read(step)
            states.write(step + 1, visit(step, inputs, found[step]))
            states.finish(found[: step + 1])
            task.advance()
    return found


class MemoryStates:
    """Hidden states in memory, with nothing to resume.

    Args:
        keep_all: keep the inputs of every step, not only of the next.
    """

    def __init__(self, *, keep_all: bool = False) -> None:
        self._keep_all = keep_all
        self._inputs: dict[int, list[Tensor]] = {}

    def resume(self) -> Tensor | None:
        return None

    def read(self, step: int) -> Iterator[Tensor]:
        return iter(self._inputs[step])

    def write(self, step: int, inputs: Iterable[Tensor]) -> None:
        written = list(inputs)
        if not self._keep_all:
            self._inputs.clear()
        self._inputs[step] = written

    def finish(self, found: Tensor) -> None:
        pass


class DiskStates:
    """Hidden states in a folder.

    Args:
        folder: made if it is not there.
        key: names what the run depends on; what another key left behind is ignored.
        like: hidden states of any window, for their shape, dtype and device.
        count: how many windows there are.
        steps: how many steps there are.
        keep_all: keep the inputs of every step, not only of the next.

    Raises:
        TealError: the disk has no room for them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        key: str,
        like: Tensor,
        count: int,
        steps: int,
        keep_all: bool = False,
    ) -> None:
        self._folder, self._key, self._like = folder, key, like
        self._count, self._keep_all = count, keep_all
        folder.mkdir(parents=True, exist_ok=True)
        if self.resume() is None:
            files = steps if keep_all else 2
            artifacts.check_free_space(folder, files * count * like.nbytes)

    def resume(self) -> Tensor | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._state, framework="pt") as file:
                if (file.metadata() or {}).get("key") != self._key:
                    return None
                found = file.get_tensor("found")
            steps = range(1 if self._keep_all else len(found), len(found) + 1)
            size = self._count * self._like.nbytes
            complete = all(self._file(step).stat().st_size == size for step in steps)
        except (OSError, SafetensorError):
            return None
        return found if complete else None

    def read(self, step: int) -> Iterator[Tensor]:
        like = self._like
        with self._file(step).open("rb") as file:
            for _ in range(self._count):
                content = bytearray(file.read(like.nbytes))
                yield torch.frombuffer(content, dtype=like.dtype).view(like.shape).to(like.device)

    def write(self, step: int, inputs: Iterable[Tensor]) -> None:
        with self._file(step).open("wb") as file:
            for hidden in inputs:
                file.write(hidden.contiguous().cpu().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, found: Tensor) -> None:
        from safetensors.torch import save

        content = save({"found": found.contiguous()}, metadata={"key": self._key})
        artifacts.atomic_write(self._state, content)

    @property
    def _state(self) -> Path:
        return self._folder / "state.safetensors"

    def _file(self, step: int) -> Path:
        return self._folder / f"hidden-{step if self._keep_all else step % 2}.bin"
