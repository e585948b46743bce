"""A clock whose times a test can foretell."""

from __future__ import annotations

import itertools
from types import ModuleType, SimpleNamespace

import pytest


def tick(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Let the modules' clock go on by one second whenever one of them reads it."""
    seconds = map(float, itertools.count())
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    for module in modules:
        monkeypatch.setattr(module, "time", clock)
