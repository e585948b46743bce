"""`teal models --remove`, killed anywhere and at the same time as what makes a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import tiny
from faults.killing import beside, run


def files(home: Path) -> list[Path]:
    """What is left of any model; locks and the date of its use are not."""
    kept = [path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return [path for path in kept if "state" not in path.parts]


def test_a_killed_removal_is_finished_by_the_next(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", hidden_size=16, intermediate_size=32)
    made = tmp_path / "made"
    made.mkdir()
    assert run(made, ["convert", str(folder)]) == 0
    remove = ["models", "--remove", str(folder), "--yes"]
    whole = tmp_path / "whole"
    shutil.copytree(made, whole)
    assert run(whole, remove) == 0
    touches = int(beside(whole, "touches").read_text())
    assert files(whole) == []
    for place in range(1, touches + 1):
        home = tmp_path / f"killed-{place}"
        shutil.copytree(made, home)
        assert run(home, remove, kill_at=place) == -9
        # It may have been killed once all was gone.
        assert run(home, remove) in ((0,) if files(home) else (0, 3)), place
        assert files(home) == [], place
        assert run(home, ["convert", str(folder)]) == 0, place
