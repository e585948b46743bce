"""How fast this machine's memory is: the ceiling of every decoding speed.

What else the machine does only makes a read slower, so that the fastest of many is the nearest to
what the memory can do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal_cli.environment import available_memory
from teal_cli.errors import TealError

# Far beyond any cache: 32 MB of L3 on a Zen 3, 50 MB of L2 on an H100, 1.1 GB of L3 on the
# largest servers (which share it between sockets that one read does not span).
_BUFFER_BYTES = 1 << 30
_SMALLEST_BUFFER_BYTES = 1 << 26
_REPEATS = 3  # reads in a row; they are repeated beside what is measured


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes moved a second, and by what."""

    bytes_per_s: float
    how: str


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """Measure a device's memory once: what a CPU reads with all threads, what a GPU copies.

    Raises:
        TealError: not even a small buffer fits into memory.
    """
    free = available_memory(device)
    size = _BUFFER_BYTES if free is None else min(_BUFFER_BYTES, free // 4)
    size -= size % 4096
    if size < _SMALLEST_BUFFER_BYTES:
        raise TealError("there is not enough memory to measure its bandwidth")
    buffer = torch.ones(size // 4, device=device)
    if device.type == "cuda":
        target = torch.empty_like(buffer)
        seconds = _fastest_on_gpu(lambda: target.copy_(buffer))
        return Bandwidth(2 * size / seconds, f"copy of {size / 1e9:.1f} GB, read and written")
    # torch sums float32 at 17 GB/s where it sums int64 at 29 and a dot product reads 26 (Zen 3,
    # 2 threads); which of the two is nearer to the memory's limit depends on the machine.
    reads: dict[str, Callable[[], Tensor]] = {
        "int64 sum": buffer.view(torch.int64).sum,
        "float32 dot product": lambda: torch.dot(buffer, buffer),
    }
    rates = {name: size / _fastest_on_cpu(read) for name, read in reads.items()}
    best = max(rates, key=lambda name: rates[name])
    threads = torch.get_num_threads()
    return Bandwidth(rates[best], f"{best} over {size / 1e9:.1f} GB, {threads} threads")


def ceiling(reads: Sequence[Bandwidth], seen: Mapping[str, float]) -> Bandwidth:
    """The most that the memory was seen to give: what no row exceeds.

    Args:
        reads: measured beside the rows, at least one.
        seen: bytes a second that the rows themselves read in their fastest runs, by label.
    """
    best = max(reads, key=lambda read: read.bytes_per_s)
    label = max(seen, key=lambda name: seen[name])
    if seen[label] > best.bytes_per_s:
        measured = f"{best.how}: {best.bytes_per_s / 1e9:.1f} GB/s"
        return Bandwidth(seen[label], f"reached by the row {label}; {measured}")
    return Bandwidth(best.bytes_per_s, f"{best.how}, the fastest read")


def _fastest_on_cpu(action: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _fastest_on_gpu(action: Callable[[], object]) -> float:
    action()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times)
