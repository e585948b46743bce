"""Threads that run one compiled function together."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import torch

# Lets every thread through every barrier that it may yet come to; a futex sees the lower half.
_OPEN = (1 << 62) - 1

# Linux's system call by machine, and its operations, private to the process.
FUTEX = {"x86_64": 202, "aarch64": 98}
WAIT, WAKE, ALL = 128, 129, (1 << 31) - 1


def default_threads() -> int:
    """As many threads as torch uses, and no more than there are cores for this process.

    Threads that wait for each other at a barrier should all be running.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores))


def run(work: Callable[[int], None], threads: int, barrier: torch.Tensor) -> None:
    """Run work(0) here and work(1) ... work(threads - 1) on other threads, at the same time.

    Args:
        work: takes a thread's number; it may wait for the others at the barrier.
        threads: how many.
        barrier: int64, the arrivals so far, in its first element, which is set to 0, and in its
            second how many threads sleep.
    """
    barrier[0] = 0
    if threads == 1:
        work(0)
        return
    pool, lock = _pool(threads, os.getpid())  # a forked child has none of its parent's threads
    with lock:  # the threads of two teams would wait for each other
        others = []
        try:
            others += [pool.submit(work, thread) for thread in range(1, threads)]
            work(0)
            for other in others:
                other.result()
        except BaseException:
            # Ctrl-C, say, before this thread came to the barrier: the others still wait there.
            barrier[0] = _OPEN
            if syscall_address():
                number = FUTEX[platform.machine()]
                ctypes.CDLL(None).syscall(number, ctypes.c_void_p(barrier.data_ptr()), WAKE, ALL)
            wait(others)
            raise


@cache
def _pool(threads: int, process: int) -> tuple[ThreadPoolExecutor, threading.Lock]:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="teal"), threading.Lock()


@cache
def syscall_address() -> int:
    """Address of libc's function for any system call; 0 where we know no futex to call by it."""
    if sys.platform != "linux" or platform.machine() not in FUTEX or sys.byteorder != "little":
        return 0
    return ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0


@cache
def give_way_address() -> int:
    """Address of the system's function that lets other threads have the core; 0 if unknown."""
    try:
        if sys.platform == "win32":
            function = ctypes.windll.kernel32.SwitchToThread
        else:
            function = ctypes.CDLL(None).sched_yield
    except (AttributeError, OSError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
