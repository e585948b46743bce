"""What every test of faults runs under: a time limit, a memory limit, repeatable examples."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import pytest
from hypothesis import HealthCheck, settings

_LIMIT_S = 120  # a test's, which takes a few seconds: whatever reaches it hangs
_LIMIT_BYTES = 2_000_000_000  # beyond what the process has before a test

# FAULT_EXAMPLES=20000 searches at random; without it the examples are the same in every run.
_SEARCH = os.environ.get("FAULT_EXAMPLES")
settings.register_profile(
    "faults",
    derandomize=_SEARCH is None,
    max_examples=int(_SEARCH or 60),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("faults")


@pytest.fixture(autouse=True)
def _bounded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Turn a hang, or memory beyond reason, into an error."""
    if sys.platform != "linux" or request.node.get_closest_marker("slow"):
        yield
        return
    import resource

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"a hang: the test takes more than {_LIMIT_S} s")

    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + _LIMIT_BYTES
    previous = signal.signal(signal.SIGALRM, late)
    if _SEARCH is None:
        signal.alarm(_LIMIT_S)
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
