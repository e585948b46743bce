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
from prompt_toolkit.input.ansi_escape_sequences import ANSI_SEQUENCES
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import DummyOutput

Type = Callable[[str], str]

CTRL_C, CTRL_D, ALT_ENTER, UP, TAB = "\x03", "\x04", "\x1b\r", "\x1b[A", "\t"
CTRL_G, CTRL_Q, CTRL_R, CTRL_S, CTRL_SPACE, CTRL_Z = "\x07", "\x11", "\x12", "\x13", "\x00", "\x1a"
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


def test_the_next_chat_remembers_where_that_is_asked_for(teal_home: Path, tmp_path: Path) -> None:
    path = tmp_path / "state" / "history.jsonl"
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):

        def typed(text: str, history: Path | None = path) -> str:
            pipe.send_text(text)
            return editor.line_editor(sys.stdout, history).prompt()

        typed("first\r")
        typed(PASTE.format("two\nlines") + "\r")
        assert typed(f"{UP}{UP}{UP}\r") == "first"
        stored = path.read_bytes()
        assert path.stat().st_mode & 0o777 == 0o600
        # Unless it is asked for, nothing is kept, and nothing is read.
        assert typed(f"{UP}secret\r", None) == "secret"
        assert path.read_bytes() == stored
    assert not teal_home.exists()


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


def test_tab_lists_what_fits_and_counts_what_does_not(keys: Type, tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"{number:04}").touch()
    with pytest.raises(KeyboardInterrupt):
        keys(f"/load {tmp_path}/{TAB}{CTRL_C}{CTRL_C}")
    assert keys(f"/load {tmp_path}/000{TAB}1\r") == f"/load {tmp_path}/0001"


@pytest.mark.parametrize("search", [CTRL_R, CTRL_S])
@pytest.mark.parametrize(
    "typed",
    [
        CTRL_C,
        f"ear{CTRL_C}",
        f"ear{CTRL_G}",
        f"nothing like it{CTRL_C}",
        "\r",
        CTRL_D + CTRL_C,
        PASTE.format("ear\nx") + CTRL_C,
    ],
)
def test_a_search_is_left_and_the_chat_goes_on(keys: Type, search: str, typed: str) -> None:
    assert keys("earlier\r") == "earlier"
    assert keys(f"{search}{typed}now\r") == "now"
    with pytest.raises(KeyboardInterrupt):
        keys(f"{search}{typed}{CTRL_C}")
    assert keys("after\r") == "after"


def test_a_search_finds_and_enter_takes_what_it_found(keys: Type) -> None:
    for text in ("one apple", "two pears", "three apples"):
        keys(f"{text}\r")
    assert keys(f"{CTRL_R}apple\r\r") == "three apples"
    assert keys(f"{CTRL_R}apple{CTRL_R}{CTRL_R}\r!\r") != "three apples"
    assert keys(f"{CTRL_R}pears{ALT_ENTER}\r") == "two pears"


def test_ctrl_c_clears_at_once_what_is_selected(keys: Type) -> None:
    assert keys(f"wrong{CTRL_SPACE}\x01{CTRL_C}>right\r") == ">right"  # Ctrl-C > is a key too


def test_ctrl_q_writes_any_key(keys: Type) -> None:
    assert keys(f"a{CTRL_Q}{CTRL_C}b\r") == f"a{CTRL_C}b"


def test_a_paste_may_hold_any_byte(keys: Type) -> None:
    assert keys(PASTE.format("a\x03\x04\x12b\x1b[A") + "\r") == "a\x03\x04\x12b\x1b[A"


ENDS = {
    CTRL_C,
    CTRL_D,
    "\r",
    "\n",
    CTRL_Z,
}  # of the prompt, as documented; Ctrl-Z stops the process
CONTROL = [chr(code) for code in (*range(32), 127) if chr(code) not in {*ENDS, "\x1b"}]
ALT = [f"\x1b{chr(code)}" for code in range(32, 127) if chr(code) not in "O[P]X^_"]
SEQUENCES = sorted(
    sequence
    for sequence in ANSI_SEQUENCES
    if sequence.startswith("\x1b") and ANSI_SEQUENCES[sequence] is not Keys.BracketedPaste
)
AFTER_CTRL_X = [f"\x18{key}" for key in (*CONTROL, "(", ")", "e", "u", "r")]


@pytest.mark.parametrize("state", ["", "some text", f"{CTRL_R}ear"])
@pytest.mark.parametrize(
    "pressed",
    [CONTROL, ALT, SEQUENCES, AFTER_CTRL_X],
    ids=["control", "alt", "functions", "ctrl-x"],
)
def test_no_other_key_ends_the_chat(keys: Type, state: str, pressed: list[str]) -> None:
    """After any key a line can be cleared, and the next turn is read."""
    assert keys("earlier\r") == "earlier"
    for key in pressed:
        typed, turns = f"{state}{key}{CTRL_G}{CTRL_G}{CTRL_C}ok\r", 0
        while turns < 3:  # a key may send the line; Ctrl-C on an empty one says how to leave
            try:
                turn = keys(typed)
            except KeyboardInterrupt:
                turn = ""
            if turn.endswith("ok"):
                break
            typed, turns = "", turns + 1
        assert turns < 3, repr(key)


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
