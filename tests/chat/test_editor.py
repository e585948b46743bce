"""Reading turns, with the keys that a user presses."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teal_cli import console
from teal_cli.chat import editor

pytest.importorskip("prompt_toolkit")

from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

Type = Callable[[str], str]

CTRL_C, CTRL_D, ALT_ENTER, UP, TAB = "\x03", "\x04", "\x1b\r", "\x1b[A", "\t"
PASTE = "\x1b[200~{}\x1b[201~"


@pytest.fixture
def keys(teal_home: Path) -> Iterator[Type]:
    """Type these keys at one prompt of a chat that goes on; return the turn that comes of it."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        session = editor.line_editor(sys.stdout)

        def type_keys(text: str) -> str:
            pipe.send_text(text)
            return session.prompt()

        yield type_keys


def test_enter_sends_and_alt_enter_breaks_the_line(keys: Type) -> None:
    assert keys("Hello\r") == "Hello"
    assert keys(f"one{ALT_ENTER}two\r") == "one\ntwo"


def test_a_paste_is_one_turn(keys: Type) -> None:
    assert keys(PASTE.format("one\ntwo\r\nthree\n") + "four\r") == "one\ntwo\nthree\nfour"
    assert keys(PASTE.format("/bye\nnot yet") + "\r") == "/bye\nnot yet"


@pytest.mark.parametrize(
    ("typed", "turn"),
    [
        ('"""one\rtwo"""\r', "one\ntwo"),
        ('"""\rone\r\rtwo\r"""\r', "one\n\ntwo"),
        ('"""one"""\r', "one"),
        ('"""/bye"""\r', "/bye"),
        ('"""a"b\r"""\r', 'a"b'),
        ('""""""\r', ""),
    ],
)
def test_triple_quotes_hold_several_lines(keys: Type, typed: str, turn: str) -> None:
    assert editor.unquote(keys(typed)) == (turn, True)


def test_quotes_elsewhere_are_text() -> None:
    for text in ("plain", 'say """x"""', '""', "/bye", ' """x"""'):
        assert editor.unquote(text) == (text, False)


def test_ctrl_c_clears_the_line_and_ctrl_d_leaves(keys: Type) -> None:
    assert keys(f"wrong{CTRL_C}right\r") == "right"
    assert keys(f"{PASTE.format('a' + chr(10) + 'b')}{CTRL_C}right\r") == "right"
    with pytest.raises(KeyboardInterrupt):
        keys(CTRL_C)
    with pytest.raises(EOFError):
        keys(CTRL_D)


def test_the_next_chat_remembers(
    keys: Type, teal_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys("first\r")
    keys(PASTE.format("two\nlines") + "\r")
    assert keys(f"{UP}{UP}{UP}\r") == "first"
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(f"{UP}\r")
        assert editor.line_editor(sys.stdout).prompt() == "first"
        monkeypatch.setenv("TEAL_NO_HISTORY", "1")
        stored = (teal_home / "state" / "chat-history.jsonl").read_bytes()
        pipe.send_text(f"{UP}secret\r")
        assert editor.line_editor(sys.stdout).prompt() == "secret"
        assert (teal_home / "state" / "chat-history.jsonl").read_bytes() == stored


@pytest.mark.parametrize(
    ("typed", "turn"),
    [
        (f"/sp{TAB} 0.4\r", "/sparsity 0.4"),
        (f"/set temp{TAB} 1\r", "/set temperature 1"),
        (f"/lo{TAB}\r", "/load"),
        (f"say /sp{TAB}\r", "say /sp"),
    ],
)
def test_tab_completes_commands(keys: Type, typed: str, turn: str) -> None:
    assert keys(typed) == turn


def test_tab_completes_files(keys: Type, tmp_path: Path) -> None:
    (tmp_path / "holiday talk.json").touch()
    assert keys(f"/load {tmp_path}/hol{TAB}\r") == f"/load {tmp_path}/holiday talk.json"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make stdin hold this text, and stdout a terminal of an installation without an editor."""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    def prepare(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr(sys, "stdout", Screen())
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
        monkeypatch.setattr(console, "_settings", console._Settings())

    return prepare


def test_without_prompt_toolkit_lines_are_read_plainly(
    terminal: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal('Hello\n"""one\ntwo"""\n')
    read = editor.open_reader()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "prompt_toolkit is not installed" in said
    assert read() == "Hello"
    assert editor.unquote(read()) == ("one\ntwo", True)
    with pytest.raises(EOFError):
        read()
