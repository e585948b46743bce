"""`teal chat` in a real terminal, key by key, on a tiny random model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

Start = Callable[..., Any]
ENDING = r"tokens? · [^\r\n]* · (?:dense|sparsity [^\r\n]*)"
WITHOUT_EDITOR = (
    "import sys; sys.modules['prompt_toolkit'] = None\n"
    "from teal_cli.app import main; sys.argv = ['teal', *sys.argv[1:]]; main()"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A home with the model's profile, made in the shortest way."""
    folder = tmp_path_factory.mktemp("home")
    options = ["--method", "uniform", "--samples", "1", "--seq-len", "32", "--dataset", "pydoc"]
    subprocess.run(
        [sys.executable, "-m", "teal_cli", "calibrate", str(tiny_model), *options],
        env=environment(folder),
        check=True,
        capture_output=True,
        timeout=120,
    )
    return folder


def environment(home: Path) -> dict[str, str]:
    settings = {"TEAL_HOME": str(home), "NO_COLOR": "1", "TERM": "xterm"}
    return {**os.environ, **settings, "PROMPT_TOOLKIT_NO_CPR": "1"}


@pytest.fixture
def start(home: Path, tiny_model: Path) -> Iterator[Start]:
    pexpect = pytest.importorskip("pexpect")
    children = []

    def spawn(*options: str, program: tuple[str, ...] = ("-m", "teal_cli")) -> Any:
        child = pexpect.spawn(
            sys.executable,
            [*program, "chat", str(tiny_model), "-s", "0", "-t", "1", *options],
            env=environment(home),
            encoding="utf-8",
            codec_errors="replace",
            timeout=30,
            dimensions=(50, 200),
        )
        children.append(child)
        child.expect(">>>")
        return child

    yield spawn
    for child in children:
        child.close(force=True)


def leave(child: Any) -> None:
    """Ctrl-D at the next prompt: before it, a terminal may swallow it."""
    import pexpect

    child.expect(">>>")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_commands_and_turns(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit")
    child = start("-n", "6", "--seed", "1", "--history")
    child.send("/sparsity 0.5\r")
    child.expect("sparsity 0.5, by uniform")
    child.send("Hello\r")
    child.expect(ENDING)
    child.expect(">>>")
    child.send("/nothing\r")
    child.expect("there is no command /nothing")
    child.send(f"/save {tmp_path}/talk.json\r")
    child.expect("saved 2 messages")
    child.send("/retry\r")
    child.expect(ENDING)
    child.expect(">>>")
    child.send("\x1b[200~one\ntwo\x1b[201~\r")
    child.expect(ENDING)
    child.expect(">>>")
    child.send("/show\r")
    child.expect(r"turns +2")
    child.expect(">>>")
    child.send("\x03")
    child.expect("Ctrl-D or /bye leaves")
    leave(child)
    assert (tmp_path / "talk.json").exists()
    again = start("--history")
    again.send("\x1b[A\x1b[A\r")  # the paste, in the next chat
    again.expect("two")
    again.expect(ENDING)
    leave(again)


def test_ctrl_c_leaves_a_search_and_not_the_chat(start: Start) -> None:
    pytest.importorskip("prompt_toolkit")
    child = start("-n", "4")
    child.send("earlier\r")
    child.expect(ENDING)
    for search in ("\x12", "\x13"):
        child.expect(">>>")
        child.send(search)
        child.expect("I-search")
        child.send("\x03")
        child.send(f"still here {ord(search)}\r")
        child.expect(f"still here {ord(search)}")
        child.expect(ENDING)
    child.expect(">>>")
    child.send("\x03" * 20)  # held down
    child.expect("Ctrl-D or /bye leaves")
    child.send("/nothing\r")
    child.expect("there is no command /nothing")
    leave(child)


def test_ctrl_z_suspends_and_the_chat_comes_back(home: Path, tiny_model: Path) -> None:
    pexpect = pytest.importorskip("pexpect")
    pytest.importorskip("prompt_toolkit")
    shell = pexpect.spawn(
        "bash", ["--norc", "-i"], env=environment(home), encoding="utf-8", timeout=60
    )
    shell.sendline(f"{sys.executable} -m teal_cli chat {tiny_model} -s 0 -n 4; echo left=$?")
    shell.expect(">>>")
    shell.send("\x1a")
    shell.expect("Stopped")
    shell.sendline("fg")
    shell.expect(">>>")
    shell.send("Hello\r")
    shell.expect(ENDING)
    shell.close(force=True)


def test_a_spinner_waits_for_the_first_token_and_leaves_no_trace(start: Start) -> None:
    pyte = pytest.importorskip("pyte")
    child = start("-n", "4", "--seed", "1")
    child.send("Hello\r")
    child.expect(ENDING)
    shown = child.before + child.after
    assert "⠋" in shown
    screen = pyte.Screen(200, 50)
    pyte.Stream(screen).feed(shown)
    assert not any("\u2800" <= cell <= "\u28ff" for row in screen.display for cell in row)
    leave(child)
    plain = start("-n", "4", "--plain")
    plain.send("Hello\r")
    plain.expect(ENDING)
    assert "⠋" not in plain.before


def test_a_plain_terminal_chats_too(start: Start) -> None:
    child = start("-n", "4", program=("-c", WITHOUT_EDITOR))
    assert "prompt_toolkit is not installed" in child.before
    child.send("half a line\x03")
    child.expect(">>>")
    child.send('"""one\rtwo"""\r')
    child.expect(ENDING)
    leave(child)


def test_an_answer_piped_on_is_plain(home: Path, tiny_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EDITOR, "chat", str(tiny_model), "-s", "0", "-n", "4"],
        input="Hello\n",
        capture_output=True,
        text=True,
        env=environment(home),
        timeout=60,
    )
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert "prompt_toolkit" not in done.stderr
