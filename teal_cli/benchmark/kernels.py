"""The kernel benchmark: every matrix of a decoder at several sparsities, beside F.linear."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from teal_cli.benchmark.bandwidth import Bandwidth, ceiling
from teal_cli.benchmark.cost import head_bytes, matrix_bytes
from teal_cli.benchmark.projections import CpuProjection, GpuProjection, Projection, linear
from teal_cli.benchmark.result import SCHEMA
from teal_cli.benchmark.timing import Spread, spread
from teal_cli.errors import UnsupportedError, whole
from teal_cli.inference.launches import MATRICES, shapes, stored_launches
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter, Silent

if TYPE_CHECKING:
    from teal_kernels.gpu.launch import StepLaunches


_ON_A_CPU = (
    "On a CPU each of these is a call of its own, with its threads to wake; decoding runs a whole "
    "token in one call, which `teal bench` measures without --kernels."
)


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One matrix at one sparsity: medians over the repeats, with 20th and 80th percentiles."""

    kernel: str
    inputs: int
    outputs: int
    target_sparsity: float
    realised_sparsity: float
    time_us: Spread
    bytes_read: int  # of the weights that are kept
    bytes_per_s: float
    linear_us: Spread
    linear_dtype: str
    speedup: Spread  # over F.linear, from pairs of runs
    launch: dict[str, Any] | None  # a GPU kernel's
    bandwidth_share: float = 0.0  # of the ceiling, which is known once every row is measured


@dataclass(frozen=True, slots=True)
class KernelResult:
    """Everything that the kernel benchmark found, and what is needed to repeat it."""

    model: dict[str, Any]
    environment: dict[str, Any]
    settings: dict[str, Any]
    bandwidth: Bandwidth
    rows: tuple[KernelRow, ...]
    notes: tuple[str, ...] = ()
    kind: str = field(default="kernels", init=False)
    schema: int = field(default=SCHEMA, init=False)


def measure_kernels(
    decoder: Decoder,
    sparsities: Sequence[float],
    repeats: int,
    read_memory: Callable[[], Bandwidth],
    reporter: Reporter,
) -> tuple[Bandwidth, tuple[KernelRow, ...], tuple[str, ...]]:
    """Measure every matrix at sparsity 0 and at each of `sparsities`, in turns with F.linear.

    The memory is read beside every matrix.

    Returns:
        The bandwidth, the rows, and sentences that they need beside them.

    Raises:
        UnsupportedError: the kernels cannot be used here.
    """
    require_kernels(decoder.device)
    levels = (0.0, *(value for value in sparsities if value > 0))
    names = (*MATRICES, "logits") if decoder.device.type == "cuda" else MATRICES
    rows: list[KernelRow] = []
    reads: list[Bandwidth] = []
    with reporter.task("measuring kernels", total=len(names) * len(levels), unit="rows") as task:
        for name in names:
            reads.append(read_memory())
            for row in _rows(decoder, name, levels, repeats):
                rows.append(row)
                task.advance()
            if name == "logits":
                task.advance(len(levels) - 1)  # the lm_head is dense
    seen = {f"{row.kernel} {row.target_sparsity:.4g}": row.bytes_per_s for row in rows}
    bandwidth = ceiling(reads, seen)
    shared = (replace(row, bandwidth_share=row.bytes_per_s / bandwidth.bytes_per_s) for row in rows)
    notes = () if decoder.device.type == "cuda" else (_ON_A_CPU,)
    return bandwidth, tuple(shared), notes


def require_kernels(device: torch.device) -> None:
    """Make sure that the sparse kernels of a device can be imported.

    Raises:
        UnsupportedError: they cannot.
    """
    name = "teal_kernels.gpu" if device.type == "cuda" else "teal_kernels.cpu"
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken Triton or numba fails in any way it likes
        raise UnsupportedError(
            f"the kernels cannot be used here ({type(error).__name__}: {whole(error)})",
            hint="Install Triton for a GPU, numba for a CPU.",
        ) from None


def _rows(decoder: Decoder, name: str, levels: Sequence[float], repeats: int) -> list[KernelRow]:
    dense, dtype = linear(decoder, name)
    on_gpu = decoder.device.type == "cuda"
    projection: Projection = (GpuProjection if on_gpu else CpuProjection)(decoder, name)
    choices: dict[float, StepLaunches] = {}
    if isinstance(projection, GpuProjection):
        choices = stored_launches(decoder, Silent()) or projection.choices
    inputs, outputs = shapes(decoder)[name]
    rows = []
    for level in levels if name != "logits" else levels[:1]:
        used = None
        if isinstance(projection, GpuProjection):
            used = projection.launches_at(level, choices)
            projection.use(used)
        realised = projection.keep(level)
        projection.seconds()
        runs = [(projection.seconds(), dense.seconds()) for _ in range(repeats)]
        times = spread([ours * 1e6 for ours, _ in runs])
        size = _bytes_read(decoder, name, realised)
        rows.append(
            KernelRow(
                kernel="lm_head" if name == "logits" else name,
                inputs=inputs,
                outputs=outputs,
                target_sparsity=level,
                realised_sparsity=realised,
                time_us=times,
                bytes_read=size,
                bytes_per_s=size / times.median * 1e6,
                linear_us=spread([theirs * 1e6 for _, theirs in runs]),
                linear_dtype=str(dtype).removeprefix("torch."),
                speedup=spread([theirs / ours for ours, theirs in runs]),
                launch=getattr(used, name)._asdict() if used else None,
            )
        )
    return rows


def _bytes_read(decoder: Decoder, name: str, sparsity: float) -> int:
    config, size, kind = decoder.config, decoder.dtype.itemsize, decoder.weights.quantization
    if name == "logits":
        return head_bytes(config, size, kind)
    shape = config.matrix_shapes[name]
    return matrix_bytes(*shape, itemsize=size, kind=kind, sparsity=sparsity)
