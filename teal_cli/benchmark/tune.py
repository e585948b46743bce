"""Searches the launches that are fastest on this device, with the kernel benchmark as yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from teal_cli.benchmark.kernels import require_kernels
from teal_cli.benchmark.projections import GpuProjection
from teal_cli.benchmark.result import SCHEMA
from teal_cli.errors import UnsupportedError
from teal_cli.inference import launches as store
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter, Task

if TYPE_CHECKING:
    from teal_kernels.gpu.launch import Launch

# Values of each field, from one to the next of which the search steps. A field that is not here
# stays as the kernels' table has it.
_VALUES: dict[str, tuple[int | None, ...]] = {
    "block_k": (8, 16, 32, 64, 128),
    "block_n": (128, 256, 512, 1024, 2048),
    "num_warps": (1, 2, 4, 8, 16),
    "registers": (None, 168, 128, 104, 80),
    "ahead": (0, 2, 4, 8, 16, 32),
    "slots": (0, 16, 8, 4),  # of 32 channels; half of them suits a sparsity of 0.5
    "more": (0, 4, 2, 8),
}
# The lm_head's tile spans the hidden axis, and it reads every row.
_LOGITS_VALUES: dict[str, tuple[int | None, ...]] = {
    "block_n": (1, 2, 4, 8, 16, 32),
    "num_warps": (2, 4, 8, 16),
}
_DENSE_FIELDS = ("block_k", "block_n", "num_warps", "registers", "ahead")
_TRIES = 30  # of launches, for one matrix in one kind of step
_REPEATS = 5
_ELEMENTS = 512  # of a tile a thread at most: beyond, compilation takes long and registers spill
_BETTER = 0.995  # repeats of one launch differ by up to 0.5 %
_LOW = (0.05, 0.1, 0.15, 0.2, 0.3)  # where the sparse step may not yet be the faster


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fastest launch of one matrix, dense or sparse, and the one that it replaces."""

    kernel: str
    step: str  # "dense" or "sparse"
    before_us: float
    after_us: float
    launch: dict[str, Any]
    sparse_from: float | None  # the least sparsity measured from which this launch beats the dense


@dataclass(frozen=True, slots=True)
class TuneResult:
    """Everything that tuning found, and what is needed to repeat it."""

    model: dict[str, Any]
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[Tuned, ...]
    notes: tuple[str, ...]  # where they were stored
    kind: str = field(default="tune", init=False)
    schema: int = field(default=SCHEMA, init=False)


def tune(decoder: Decoder, sparsities: Sequence[float], reporter: Reporter) -> tuple[Tuned, ...]:
    """Search and store the launches of every matrix, for dense steps and for sparse ones.

    A sparse launch is judged by the sum of its times at `sparsities`. What was found is stored
    after every matrix, so that an interruption loses little.

    Raises:
        UnsupportedError: see `require_tunable`.
    """
    require_tunable(decoder.device)
    entries = store.read(decoder, reporter)
    levels = tuple(value for value in sparsities if value > 0) or (0.5,)
    found: list[Tuned] = []
    names = (*store.MATRICES, "logits")
    total = _TRIES * (2 * len(store.MATRICES) + 1)
    with reporter.task("tuning", total=total, unit="launches") as task:
        for name in names:
            found += _tune_matrix(decoder, name, levels, entries, task)
            store.write(decoder, entries)
            torch.cuda.empty_cache()
    return tuple(found)


def require_tunable(device: torch.device) -> None:
    """Make sure that a device's kernels have launches to choose.

    Raises:
        UnsupportedError: it is not a GPU, or the kernels cannot be used on it.
    """
    if device.type != "cuda":
        raise UnsupportedError(
            "--tune is for the GPU's kernels: those of the CPU have nothing to choose",
            hint="Leave it out, or name a GPU with --device.",
        )
    require_kernels(device)


def _tune_matrix(
    decoder: Decoder, name: str, levels: Sequence[float], entries: store.Entries, task: Task
) -> Iterator[Tuned]:
    projection = GpuProjection(decoder, name)
    best: dict[bool, Launch] = {}
    for sparse in (False, True) if name != "logits" else (False,):
        chosen = projection.choices[sparse]
        values = _values(name, sparse)

        def cost(launch: Launch, sparse: bool = sparse, chosen: Any = chosen) -> float:
            projection.use(chosen._replace(**{name: launch}))
            return sum(_microseconds(projection, level) for level in (levels if sparse else (0.0,)))

        first = getattr(chosen, name)
        best[sparse], before, after = search(first, values, cost, _TRIES, task)
        entries[store.matrix_key(decoder, name, sparse=sparse)] = best[sparse]._asdict()
        count = len(levels) if sparse else 1
        yield Tuned(
            "lm_head" if name == "logits" else name,
            "sparse" if sparse else "dense",
            before / count,
            after / count,
            best[sparse]._asdict(),
            _sparse_from(projection, name, best) if sparse else None,
        )


def search(
    first: Launch,
    values: dict[str, tuple[int | None, ...]],
    cost: Callable[[Launch], float],
    tries: int,
    task: Task,
) -> tuple[Launch, float, float]:
    """Coordinate descent: step to the best neighbour of each field until none is better.

    Args:
        first: where to begin; it must run.
        values: of each field that may change, in order.
        cost: of a launch; it raises where a launch cannot run.
        tries: launches to measure at most.
        task: advanced by `tries`.

    Returns:
        The best launch, the cost of the first, and the best one's.
    """
    before = lowest = cost(first)
    best, tried, left = first, {first}, tries
    improved = True
    while improved and left:
        improved = False
        for neighbour in _neighbours(best, values):
            if neighbour in tried or not left:
                continue
            tried.add(neighbour)
            left -= 1
            task.advance()
            try:
                found = cost(neighbour)
            except Exception:  # too many registers, or a shape that a kernel refuses
                continue
            if found < lowest * _BETTER:
                best, lowest, improved = neighbour, found, True
                break
    task.advance(left)
    return best, before, lowest


def _neighbours(launch: Launch, values: dict[str, tuple[int | None, ...]]) -> list[Launch]:
    """The launches one step away in one field, or in a tile's two sides in opposite directions."""

    def stepped(start: Launch, part: str, step: int) -> Launch | None:
        choices = values.get(part, ())
        if (value := getattr(start, part)) not in choices:
            return None
        place = choices.index(value) + step
        if not 0 <= place < len(choices):
            return None
        change: dict[str, Any] = {part: choices[place]}
        return start._replace(**change)

    known = [name for name in launch._fields if name in values]
    found = [stepped(launch, name, step) for name in known for step in (1, -1)]
    for step in (1, -1):
        if (taller := stepped(launch, "block_k", step)) is not None:
            found.append(stepped(taller, "block_n", -step))
    return [tile for tile in found if tile is not None and _sensible(tile)]


def _sensible(launch: Launch) -> bool:
    """Not too much for a thread, and no `more` slots where there are none."""
    small = launch.block_k * launch.block_n <= _ELEMENTS * 32 * launch.num_warps
    fields = launch._asdict()
    return small and (bool(fields.get("slots")) or not fields.get("more"))


def _values(name: str, sparse: bool) -> dict[str, tuple[int | None, ...]]:
    if name == "logits":
        return _LOGITS_VALUES
    return _VALUES if sparse else {part: _VALUES[part] for part in _DENSE_FIELDS}


def _microseconds(projection: GpuProjection, sparsity: float) -> float:
    projection.keep(sparsity)
    projection.seconds()
    return median(projection.seconds() for _ in range(_REPEATS)) * 1e6


def _sparse_from(projection: GpuProjection, name: str, best: dict[bool, Launch]) -> float | None:
    """The least of a few sparsities from which on the sparse launch is the faster."""
    times = {}
    for sparse, launch in best.items():
        change: dict[str, Any] = {name: launch}
        projection.use(projection.choices[sparse]._replace(**change))
        times[sparse] = [_microseconds(projection, level) for level in _LOW]
    lost = [i for i in range(len(_LOW)) if times[True][i] > times[False][i]]
    place = lost[-1] + 1 if lost else 0
    return _LOW[place] if place < len(_LOW) else None
