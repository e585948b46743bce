"""Searches the launches that are fastest on this device, with the kernel benchmark as yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fastest launch of one matrix, dense or sparse, and the one that it replaces."""

    kernel: str
    regime: float  # the sparsity from which the launch is used
    before_us: float
    after_us: float
    launch: dict[str, Any]


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

    A launch is judged by the sum of its times at those of `sparsities` for which it is used. What
    was found is stored after every matrix, so that an interruption loses little.

    Raises:
        UnsupportedError: see `require_tunable`.
    """
    require_tunable(decoder.device)
    entries = store.read(decoder, reporter)
    found: list[Tuned] = []
    names = (*store.MATRICES, "logits")
    levels = _levels(sparsities)
    total = _TRIES * (len(levels) * len(store.MATRICES) + 1)
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


def _levels(sparsities: Sequence[float]) -> dict[float, list[float]]:
    """The sparsities to measure at, by the regime that they fall into; always the dense one."""
    from teal_kernels.gpu.launch import DENSE, regime_of

    found: dict[float, list[float]] = {DENSE: [0.0]}
    for sparsity in sparsities or (0.5,):
        if (regime := regime_of(sparsity)) != DENSE:
            found.setdefault(regime, []).append(sparsity)
    return found


def _tune_matrix(
    decoder: Decoder,
    name: str,
    levels: Mapping[float, Sequence[float]],
    entries: store.Entries,
    task: Task,
) -> Iterator[Tuned]:
    projection = GpuProjection(decoder, name)
    for regime, measured in levels.items() if name != "logits" else [(0.0, (0.0,))]:
        chosen = projection.choices[regime]
        sparse = regime > 0

        def cost(launch: Launch, measured: Any = measured, chosen: Any = chosen) -> float:
            projection.use(chosen._replace(**{name: launch}))
            return sum(_microseconds(projection, level) for level in measured) / len(measured)

        first = getattr(chosen, name)
        best, before, after = search(first, _values(name, sparse), cost, _TRIES, task)
        entries[store.matrix_key(decoder, name, regime)] = best._asdict()
        label = "lm_head" if name == "logits" else name
        yield Tuned(label, regime, before, after, best._asdict())


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
