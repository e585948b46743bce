"""The prompts of earlier chats."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

pytest.importorskip("prompt_toolkit")

from teal_cli.chat import history
from teal_cli.chat.history import FileHistory


def entries(path: Path) -> list[str]:
    return list(FileHistory(path).load_history_strings())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_newest_come_first_in_a_file_for_the_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history.jsonl"
    first, second = FileHistory(path), FileHistory(path)  # two chats at once
    first.append_string("one\ntwo")
    second.append_string("Grüße \u2028 👍")
    first.append_string("/bye")
    assert entries(path) == ["/bye", "Grüße \u2028 👍", "one\ntwo"]
    assert mode(path) == 0o600


def test_a_copied_file_is_closed_again(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('"one"\n')
    path.chmod(0o644)
    assert entries(path) == ["one"]
    assert mode(path) == 0o600


def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_KEPT", 3)
    monkeypatch.setattr(history, "_MOST", 5)
    path = tmp_path / "history.jsonl"
    path.write_text("".join(f"{json.dumps(str(n))}\n" for n in range(6)))
    assert entries(path) == ["5", "4", "3"]
    assert path.read_text() == '"3"\n"4"\n"5"\n'
    assert mode(path) == 0o600
    FileHistory(path).store_string("x" * 4001)
    assert entries(path) == ["5", "4", "3"]


def test_damage_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'"one"\n\xff\xfe\n{"a": 1}\n"cut\n[[[\n"two"\n')
    assert entries(path) == ["two", "one"]
    path.unlink()
    path.mkdir()
    assert entries(path) == []
    FileHistory(path).store_string("lost")  # nowhere to put it: the chat goes on


def test_through_a_link_the_mode_of_its_target_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text('"one"\n')
    target.chmod(0o640)
    link.symlink_to(target)
    history = FileHistory(link)
    history.store_string("two")
    assert list(history.load_history_strings()) == ["two", "one"]
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
