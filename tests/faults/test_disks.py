"""Disks that are full, folders that take nothing, folders on several devices."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark.commands import runner
from model.sources import source_of

from teal_cli.errors import TealError
from teal_cli.model.convert import convert
from teal_cli.progress import Silent
from teal_cli.store import models


def refuse(code: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_full_disk_leaves_nothing(
    tiny_model: Path, teal_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse(errno.ENOSPC))
        with pytest.raises(TealError, match="the disk is full"):
            convert(source_of(tiny_model), reporter=Silent())
    assert not [path for path in teal_home.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert convert(source_of(tiny_model), reporter=Silent()).is_dir()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_home_that_takes_nothing_keeps_no_model_from_use(
    code: int, teal_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkstemp", refuse(code))
        models.remember(models.ModelRef("hub", "org/name"))
    assert models.last_used() is None


@pytest.fixture
def another_device(tmp_path: Path) -> Iterator[Path]:
    """A folder that nothing in `tmp_path` can be renamed into."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second device")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_folders_on_several_devices(
    tiny_model: Path,
    another_device: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """teal's data here, its cache and the temporary files there, and the result there too."""
    monkeypatch.delenv("TEAL_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(another_device / "cache"))
    (another_device / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(another_device / "tmp"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Sentence {n} says {n * n}.\n" for n in range(900)))
    result = another_device / "result.json"
    options = ["--dataset", text, "--samples", "2", "--device", "cpu", "--offline"]
    for name, *more in (
        ("calibrate", "--seq-len", "16", "--method", "uniform"),
        ("eval", "--context", "16", "--output", result),
        ("convert", "--force"),  # takes the place of one that is there
    ):
        command = runner(name, monkeypatch, capsys)
        code, _, err = command(tiny_model, *more, *(options if name != "convert" else ()))
        assert code == 0, err
    assert json.loads(result.read_text())
    assert len(list((tmp_path / "data").rglob("*.safetensors"))) == 2
    left = [p for p in another_device.rglob("*") if p.is_file() and p != result]
    assert not left
