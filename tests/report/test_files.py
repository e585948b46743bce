"""Files that results are written to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from benchmark.commands import is_refused, runner

from teal_cli.errors import MissingError, UsageError
from teal_cli.report import files


@pytest.mark.parametrize("name", ["x.txt", "x", "json"])
def test_an_unknown_suffix_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match=r"--output .* must end in \.json, \.csv or \.md"):
        files.check_table(Path(name))
    with pytest.raises(UsageError, match=r"--plot .* must end in \.png, \.pdf or \.svg"):
        files.check_figure(Path(name))


def test_suffixes_in_capitals_and_no_file_at_all() -> None:
    files.check_table(Path("x.MD"))
    files.check_table(None)
    files.check_figure(None)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="matplotlib") as caught:
        files.check_figure(Path("x.png"))
    assert caught.value.hint is not None
    assert "teal-cli[plot]" in caught.value.hint


def test_a_place_that_takes_no_file_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "file").touch()
    for name, said in (
        ("none/x.json", f"there is no folder {tmp_path / 'none'}"),
        ("file/x.json", "there is no folder"),
        ("folder.json", "this is a folder"),
        ("loop.json", "the links lead in a circle"),
        ("x" * 300 + ".json", "the name is too long"),
    ):
        with pytest.raises(UsageError, match=said):
            files.check_table(tmp_path / name)
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    (tmp_path / "old.json").write_text("old")
    for name in ("x.json", "link.json", "old.json", "ü \udcff.json", "x" * 200 + ".json"):
        files.check_table(tmp_path / name)
    assert (tmp_path / "old.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 5  # nothing was made


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may everything")
def test_rights_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "x.json").touch(mode=0o400)
    with pytest.raises(UsageError, match="permission denied"):
        files.check_table(tmp_path / "x.json")


@pytest.mark.parametrize("command", ["bench", "eval"])
def test_commands_refuse_it_before_any_model_is_looked_for(
    command: str,
    tmp_path: Path,
    teal_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teal = runner(command, monkeypatch, capsys)
    for option, name in (("--output", "x.json"), ("--plot", "x.svg")):
        found = teal("org/none", "--offline", option, tmp_path / "none" / name)
        is_refused(found, 2, "there is no folder")
    code, _, said = teal("org/none", "--offline", "--output", tmp_path / "x.json")
    assert code == 3, said
