"""Runs a command in this process on a tiny model that is converted and calibrated already."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teal_cli import app, console, pipeline
from teal_cli.progress import Silent
from teal_cli.sparsity import stored
from teal_cli.sparsity.calibrate import calibrate
from teal_cli.store import models

Command = Callable[..., tuple[int, str, str]]


def prepare(model: Path, methods: tuple[str, ...] = ()) -> None:
    """Convert a model, and store a profile with `methods` that is made from random tokens."""
    checkpoint = pipeline.ensure_checkpoint(models.resolve(str(model)), reporter=Silent())
    decoder = checkpoint.load()
    tokens = torch.randint(3, 200, (2, 64), generator=torch.Generator().manual_seed(0))
    profile = calibrate(
        decoder,
        tokens,
        model=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        methods=methods,
        provenance={"dataset": "random tokens"},
        reporter=Silent(),
    )
    profile.save(stored.profile_path(checkpoint))


def is_refused(outcome: tuple[int, str, str], code: int, message: str) -> None:
    """A command ended with this exit code and one sentence on stderr."""
    found, out, said = outcome
    assert (found, out) == (code, "")
    assert message in " ".join(said.split())
    assert "Traceback" not in said


def runner(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run `teal NAME ...`; return its exit code, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(console, "_settings", console._Settings())
        monkeypatch.setattr(sys, "argv", ["teal", name, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run
