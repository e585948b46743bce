"""Conversations on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from teal_cli import __version__
from teal_cli.errors import MissingError, TealError
from teal_cli.inference.transcript import Transcript

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße 👍"},
    {"role": "assistant", "content": "Hi\n\tthere", "reasoning_content": "greet"},
]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "talk.json"
    Transcript("org/model", MESSAGES).save(path)
    content = json.loads(path.read_text())
    assert (content["schema"], content["kind"], content["teal"]) == (1, "chat", __version__)
    assert Transcript.load(path) == Transcript("org/model", MESSAGES)
    Transcript("org/model", MESSAGES[1:]).save(path)  # over the first
    assert Transcript.load(path).messages == MESSAGES[1:]
    assert list(path.parent.iterdir()) == [path]


def test_a_conversation_is_the_users_alone_and_keeps_its_mode(tmp_path: Path) -> None:
    path, link = tmp_path / "talk.json", tmp_path / "link.json"
    link.symlink_to(path)
    Transcript("m", MESSAGES).save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    for mode in (0o600, 0o640):
        path.chmod(mode)
        Transcript("m", MESSAGES).save(link)
        assert path.stat().st_mode & 0o777 == mode
    assert link.is_symlink()


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(TealError, match="exists and is no conversation"):
        Transcript("m", MESSAGES).save(path)
    assert path.read_text() == '{"mine": 1}'


@pytest.mark.parametrize("name", ["x" * 300, "file/below"], ids=["long", "not a folder"])
def test_a_name_that_cannot_be_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TealError, match="cannot be written"):
        Transcript("m", MESSAGES).save(tmp_path / name)
    with pytest.raises(TealError, match=r"cannot be read|there is no conversation"):
        Transcript.load(tmp_path / name)


def test_a_file_that_is_not_there_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(MissingError, match="there is no conversation"):
            Transcript.load(path)


def document(**changes: Any) -> dict[str, Any]:
    return {"schema": 1, "kind": "chat", "model": "m", "messages": MESSAGES, **changes}


def turn(**changes: Any) -> list[Any]:
    return [{**MESSAGES[1], **changes}, MESSAGES[2]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[1, 2",
        b"[" * 100_000,
        [],
        document(kind="checkpoint"),
        document(schema=2),
        document(schema="1"),
        document(messages=None),
        document(messages=["hi"]),
        document(messages=turn(content=3)),
        document(messages=turn(role="tool")),
        document(messages=turn(role=["user"])),
        document(messages=turn(content="\ud800")),
        document(messages=MESSAGES[:2]),
        document(messages=MESSAGES[::-1]),
        document(messages=[MESSAGES[0], *MESSAGES]),
    ],
    ids=lambda content: repr(content)[:40],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(TealError, match=r"talk\.json (is|has)"):
        Transcript.load(path)
