"""Messages on terminals that are narrower than they: broken between words, in pipes not at all."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from terminals import terminal

from teal_cli import console

PROSE = """
from teal_cli import console
path = "/models/" + "deep/" * 20
console.print_error("one two three four five six seven\\neight " + "nine " * 9, "Run `teal convert "
    + path + " --quantize int8` or name another folder; that is the other way to do it")
console.print_line("a word " * 8)
console.print_line("label    " + "a value " * 5 + "\\nnext     one")
console.print_dim("a word " * 8)
console.print_dim("pieces of one line " * 4, end="")
console.print_dim("")
console.reporter().note("kept in " + path)
console.print_table(["first", "second"], [["1", "2"]], title=["a title of many words " * 3])
"""


def test_a_terminal_breaks_messages_between_words() -> None:
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal(PROSE, COLUMNS="40"))
    path = "/models/" + "deep/" * 20
    words = "a word a word a word a word a word a\nword a word a word"
    assert [line.rstrip() for line in out.splitlines()] == [
        "error: one two three four five six seven",
        "  eight nine nine nine nine nine nine",
        "  nine nine nine",
        "Run",
        f"`teal convert {path} --quantize int8`",
        "or name another folder; that is the",
        "other way to do it",
        *words.splitlines(),
        "label    a value a value a value a value",
        "         a value",
        "next     one",
        *words.splitlines(),
        ("pieces of one line " * 4).rstrip(),
        "kept in",
        path,
        "a title of many words a title of many",
        "words a title of many words",
        "first  second",
        "1           2",
    ]


def test_a_message_has_the_room_of_stderr_where_stdout_is_a_pipe() -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    script = "from teal_cli import console; console.print_error('word ' * 18 + 'end')"
    subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        env={**environment, "NO_COLOR": "1"},
        check=True,
    )
    assert os.read(leader, 1000).decode() == f"error: {'word ' * 18}end\r\n"
    os.close(leader)
    os.close(follower)


def test_a_pipe_gets_messages_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error("word " * 50 + "end", "hint " * 50 + "end")
    assert capsys.readouterr().err == f"error: {'word ' * 50}end\n{'hint ' * 50}end\n"
