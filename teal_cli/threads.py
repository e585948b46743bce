"""How many threads compute on a CPU, and how long they spin for each other.

torch is imported where it is needed: its pool reads the environment as it starts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

# What says how threads of an OpenMP pool wait; who sets one of them has chosen.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# GNU's pool, which torch brings on Linux, spins 300,000 turns before it sleeps, some 10 ms. Beside
# one busy process on two cores, a layer of calibration then takes 5.5 times as long as alone; with
# 4,000 turns 2.2 times, and alone no longer than before (with 300 a half more).
_SPINS = "4000"
_BLOCK_MS = "1"  # the same for LLVM's and Intel's, whose own is 200


def spin_briefly(variables: MutableMapping[str, str]) -> None:
    """Have torch's threads sleep soon where they wait; before torch is imported."""
    if not any(name in variables for name in _WAITING):
        variables.update(GOMP_SPINCOUNT=_SPINS, KMP_BLOCKTIME=_BLOCK_MS)


def use_threads(asked: int | None) -> None:
    """Compute on so many threads from here on; None is `default`."""
    import torch

    torch.set_num_threads(asked or default())


def default() -> int:
    """As many as torch takes (OMP_NUM_THREADS, else the cores that are no hyperthreads) and may."""
    import torch

    return min(torch.get_num_threads(), usable())


def usable(root: Path = Path("/")) -> int:
    """Cores that this process may use: by its affinity, and by the quota of its container.

    Of a quota of 1.5, two threads get more done than one.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = min(_quotas(root))
    return cores if quota == math.inf else max(1, min(cores, math.ceil(quota)))


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each of this process's control groups may take (cgroups 1, 2)."""
    yield math.inf
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # no Linux
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mount = root / "sys/fs/cgroup"
        if number != "0":
            if "cpu" not in controllers.split(","):
                continue
            mount /= controllers if (mount / controllers).is_dir() else "cpu"
        # A container sees its own group as the root, under whatever name it has outside.
        group = mount / path.strip("/")
        while True:
            yield _quota(group)
            if group == mount or mount not in group.parents:
                break
            group = group.parent


def _quota(group: Path) -> float:
    """A group's own quota in cores; infinite where there is none."""
    try:
        if (group / "cpu.max").is_file():
            amount, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            amount, period = ((group / name).read_text(encoding="ascii") for name in names)
        found = float(amount) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no file; "max"
        return math.inf
    return found if found > 0 else math.inf  # cgroup 1 has -1 for none
