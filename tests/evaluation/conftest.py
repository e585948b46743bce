"""`teal eval` on a tiny model; one thread, as at these sizes a second one only waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark.commands import Command, prepare, runner
from threads import one_thread


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A home with the tiny model, converted and calibrated."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(folder))
        prepare(tiny_model, ("sensitivity", "uniform"))
    return folder


@pytest.fixture
def evaluate(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs `teal eval ...`; gives its exit code, stdout and stderr."""
    monkeypatch.setenv("TEAL_HOME", str(home))
    return runner("eval", monkeypatch, capsys)
