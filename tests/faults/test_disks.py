"""Disks that are full and folders that take nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
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
